"""Distillation: step 0, guidance as an input, whole runs, what is refused; losses have their own file."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from run_folders import config_of, make_checkpoint
from shoestring.adapt.distill import Distilling, distill_recipe, distill_runs
from shoestring.adapt.superres import superres_recipe
from shoestring.cli.main import app
from shoestring.config import (
    SamplingConfig,
    SuperResConfig,
    TokensConfig,
    UNetConfig,
    apply_overrides,
)
from shoestring.diffusion.distillation import (
    Sample,
    guided_estimate,
    guided_loss,
)
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning, NoiseLevel
from shoestring.models.files import build_network, load_model, read_header, save_model
from shoestring.planning import model_flops
from shoestring.planning.memory import forecast_memory
from shoestring.runtime import UserError, stream
from shoestring.sampling.generate import load_pipeline
from shoestring.sampling.guidance import GuidedDenoiser
from shoestring.training.distilling import Distillation
from shoestring.training.folder import checkpoint_folders
from shoestring.training.loop import train
from shoestring.training.starting import initial_weights

EDM = EDMProcess(0.5)
UNET = UNetConfig(kind="unet", in_channels=3, channels=8, caption_dim=256, patch_size=2, mask_captions=True)


# -- networks ---------------------------------------------------------------------------------------------


def drawn(config):
    network = build_network(config, stream(3, "distill"))
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return network


@pytest.fixture(params=["microdit", "unet"])
def config(request):
    config = config_of()
    if request.param == "microdit":
        return config
    return config.model_copy(update={"model": UNET, "tokens": TokensConfig(method="dense")})


def noisy(count=3, side=8):
    generator = torch.Generator().manual_seed(5)
    x, text = (
        torch.randn(count, 3, side, side, generator=generator),
        torch.randn(count, 4, 256, generator=generator),
    )
    level = NoiseLevel(torch.ones(count), torch.tensor([0.2, 1.0, 5.0][:count]))
    return x, level, Conditioning(text, torch.ones(count, 4, dtype=torch.bool))


def test_guidance_of_each_picture_is_the_sampler_s(config):
    torch.manual_seed(0)
    denoiser = EDM.denoiser(drawn(config).eval(), torch.float32)
    x, level, captions = noisy()
    scales = torch.tensor([1.0, 2.5, 4.0])
    with torch.no_grad():
        ours = guided_estimate(denoiser, x, level, Sample(x, x, captions, scales, scales))
        for i, scale in enumerate(scales.tolist()):
            row = slice(i, i + 1)
            guided = GuidedDenoiser(denoiser, SamplingConfig(guidance=scale))
            here = NoiseLevel(level.alpha_B[row], level.sigma_B[row])
            theirs = guided(x[row], here, captions.part(row)).image()
            torch.testing.assert_close(ours[row], theirs, rtol=1e-4, atol=1e-5)


def test_step_0_with_guidance_as_an_input_is_the_base(config, tmp_path):
    make_checkpoint(tmp_path / "base", config)
    base = load_model(next((tmp_path / "base/checkpoints").glob("*/ema.safetensors")))[1]
    recipe = distill_recipe(tmp_path / "base", "student", Distilling("guided", 4, (1.0, 6.0), 100, 10, 1e-3))
    student = build_network(recipe, stream(0, "init"))
    initial_weights(recipe, student)
    x, level, captions = noisy()
    with torch.no_grad():
        for scale in (1.0, 3.7):
            asked = replace(captions, guidance_B=torch.full((3,), scale))
            ours = EDM.denoiser(student.eval(), torch.float32)(x, level, asked).image()
            assert torch.equal(ours, EDM.denoiser(base, torch.float32)(x, level, captions).image())
    for name, parameter in student.named_parameters():  # not so any more once it has learned
        if "guidance_embedder" in name or "cond_proj" in name:
            parameter.data += 0.1
    with torch.no_grad():
        moved = EDM.denoiser(student, torch.float32)(x, level, asked).image()
    assert not torch.allclose(moved, ours)


def test_every_parameter_of_a_student_learns(config):
    config = config.model_copy(update={"model": config.model.model_copy(update={"guidance_input": True})})
    student, teacher = (
        drawn(config),
        drawn(config_of())
        if config.model.kind == "microdit"
        else drawn(config.model_copy(update={"model": UNET})),
    )
    # At 8 px a U-Net's middle is one place, whose attention has nothing to choose and so nothing to learn.
    x, level, captions = noisy(side=8 if config.model.kind == "microdit" else 32)
    sample = Sample(0.5 * x, x, captions, torch.rand(3), torch.tensor([1.5, 2.0, 3.0]))
    pair = [EDM.denoiser(network, torch.float32) for network in (student, teacher)]
    guided_loss(EDM, *pair, sample, level).mean().backward()
    without = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in without if "mask_token" not in name] == []
    assert all(p.grad is None for p in teacher.parameters())


def test_flops_with_guidance_as_an_input(config):
    counted, ours = [], []
    for takes_scale in (True, False):
        model = config.model.model_copy(update={"guidance_input": takes_scale})
        network = build_network(config.model_copy(update={"model": model}), stream(0, "flops"))
        x, level, captions = noisy(1)
        side = 8 // model.patch_size
        with FlopCounterMode(display=False) as counter:
            network(x, level.sigma_B, replace(captions, guidance_B=torch.ones(1) if takes_scale else None))
        counted.append(counter.get_total_flops())
        ours.append(model_flops(model, (side, side), 4, 0.0, config.tokens).forward)
    assert ours[0] - ours[1] == counted[0] - counted[1] > 0


# -- runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "base"
    config = config_of()
    stages = (config.stages[1].model_copy(update={"resolution": 24}),)  # the least that shapes are drawn at
    make_checkpoint(folder, config.model_copy(update={"stages": stages}))
    return folder


def weights(run):
    return read_header(checkpoint_folders(run)[-1] / "ema.safetensors", None).tensors


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "consistency"],
        ["--method", "consistency", "--guidance", "1", "--guidance", "3", "stages.0.mask_ratio=0.5"],
        ["--method", "codi", "distill.target=student"],
        ["--method", "guided"],
        ["--method", "progressive", "--steps", "2", "--first-steps", "4", "--guidance", "2"],
    ],
    ids=["consistency", "masked, scale as an input", "codi", "guided", "progressive"],
)
def test_a_distillation_trains_resumes_exactly_and_draws(base, tmp_path, options):
    out = tmp_path / "student"
    words = ["adapt", "distill", str(base), *options, "--nimg", "32", "--batch", "8", "--lr", "0.001"]
    words += ["--out", str(out), "logging.checkpoint_nimg=16", "logging.keep_checkpoints=9"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    first = weights(out)
    start = weights(base)
    assert any(not torch.equal(first[name], start[name]) for name in start)
    newest = checkpoint_folders(out)[-1]
    assert int(newest.name) == 32
    newest.rename(tmp_path / "apart")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    again = weights(out)
    assert all(torch.equal(first[name], again[name]) for name in first)

    pipeline = load_pipeline(out, torch.device("cpu"))
    sampling = pipeline.config.sampling
    assert sampling.sampler == {"guided": "euler", "progressive": "ddim"}.get(options[1], "consistency")
    drawn = pipeline.draw(["a red circle", ""], 0, [0, 1], sampling)
    assert drawn.shape == (2, 3, 24, 24)
    if pipeline.config.model.guidance_input:
        other = pipeline.draw(["a red circle", ""], 0, [0, 1], sampling.model_copy(update={"guidance": 1.2}))
        assert pipeline.denoiser.guidance_input
        assert other.shape == drawn.shape
        with pytest.raises(UserError, match="a negative prompt is given, but this model was distilled"):
            pipeline.draw(["a red circle"], 0, [0], sampling, negative="blue")


def test_progressive_grids_are_nested(base, tmp_path):
    runs = distill_runs(base, "s", tmp_path / "s", Distilling("progressive", 2, (2.0, 2.0), 8, 8, 1e-3), 8)
    assert [each.asked.steps for each in runs] == [8, 4, 2]
    assert runs[-1].out == tmp_path / "s"
    assert [each.teacher for each in runs] == [base, runs[0].out, runs[1].out]
    last = [*EDM.grid(SamplingConfig(), 3)[:-2], (1.0, 0.0)]  # two steps, from 80 and from 2.5
    assert last[1][1] == pytest.approx(2.515, abs=0.001)
    for each in runs:
        config = distill_recipe(each.teacher, each.name, each.asked)
        steps = each.asked.steps
        assert (config.sampling.steps, config.distill.steps) == (steps, steps)
        # Guidance is folded in once: a student knows nothing without its condition.
        assert config.distill.guidance == ((2.0, 2.0) if steps == 8 else (1.0, 1.0))
        for ours, theirs in zip(EDM.grid(config.sampling, steps)[:: steps // 2], last, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        make_checkpoint(each.out, config)


def test_the_forecast_of_memory_knows_the_teacher(base):
    recipe = distill_recipe(base, "student", replace(asked(), nimg=8))
    plain = recipe.model_copy(update={"distill": None})
    forecasts = [forecast_memory(config, config.stages[0], micro_batch=8) for config in (recipe, plain)]
    held = sum(p.numel() for p in build_network(plain).parameters())
    assert forecasts[0].total - forecasts[1].total == 4 * held
    assert forecasts[0].averages == forecasts[1].averages


def test_the_target_has_the_student_s_positions(base, tmp_path, monkeypatch):
    seen = []
    called = Distillation.__call__

    def noted(self, *inputs):
        found = called(self, *inputs)
        seen.append((self.network.position_scale, self.twin.position_scale))
        return found

    monkeypatch.setattr(Distillation, "__call__", noted)
    recipe = distill_recipe(base, "student", replace(asked(), nimg=8))
    recipe = apply_overrides(recipe, ["stages.0.position_scale=2.0"])
    assert train(recipe, tmp_path / "x", Console(quiet=True))
    assert set(seen) == {(2.0, 2.0)}


def test_another_teacher_on_resume_is_refused(tmp_path):
    config = config_of()
    stages = (config.stages[1].model_copy(update={"resolution": 24}),)
    config = config.model_copy(update={"stages": stages})
    make_checkpoint(tmp_path / "base", config)
    recipe = distill_recipe(tmp_path / "base", "student", replace(asked(), nimg=8))
    assert train(recipe, tmp_path / "x", Console(quiet=True))
    file = next(tmp_path.glob("base/checkpoints/*/ema.safetensors"))
    header = read_header(file, None)
    save_model(file, {n: 1.1 * v for n, v in header.tensors.items()}, header.config, header.facts)
    with pytest.raises(UserError, match=r"has other weights than when .* was begun"):
        train(recipe, tmp_path / "x", Console(quiet=True))


# -- mistakes ---------------------------------------------------------------------------------------------


def asked(method="consistency", guidance=None, steps=4):
    return Distilling(method, steps, guidance, 40, 8, 1e-3)


def test_teacher_and_student_of_other_data(base, tmp_path):
    recipe = distill_recipe(base, "student", asked())
    changed = apply_overrides(recipe, ["data.source=openmoji"])
    with pytest.raises(
        UserError, match=r"trained with data\.source=shapes, and the student has openmoji"
    ) as error:
        train(changed, tmp_path / "x", Console(quiet=True))
    assert "\n" not in str(error.value)
    changed = apply_overrides(recipe, ["process.sigma_data=0.7", "initial_weights=null"])
    with pytest.raises(UserError, match=r"sigma_data 0\.5, and the student has 0\.7"):
        train(changed, tmp_path / "y", Console(quiet=True))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["distill.guidance=[1, 3]"], "model.guidance_input is false, so the model would not know"),
        (["distill.method=guided"], "method is guided, which makes the scale of guidance an input"),
        (["distill.method=codi"], "method=codi has no teacher to guide"),
        (["distill.guidance=[3, 1]"], r"guidance is .*3.*1.*; it must be"),
        (["distill.steps=1"], "a path needs 2 noise levels or more"),
        (["parallel.sharding=fsdp"], "parallel.sharding is fsdp, which spreads the average"),
        (["stages.0.ema_decay=null"], "ema_decay is null, but distill.target is ema"),
        (["distill.data_weight=1"], "data_weight is 1, but method=consistency has none"),
        (["lora={rank: 4}"], "lora is set, but distill trains whole weights; put the factors into"),
        (["distill.teacher=nowhere"], "nowhere does not exist"),
    ],
)
def test_settings_that_do_not_fit(base, tmp_path, changes, sentence):
    recipe = distill_recipe(base, "student", asked())
    with pytest.raises(UserError, match=sentence):
        train(apply_overrides(recipe, changes), tmp_path / "x", Console(quiet=True))


def test_only_codi_has_squared_distances(base):
    assert distill_recipe(base, "student", asked("codi")).distill.huber == 0
    assert distill_recipe(base, "student", asked("consistency")).distill.huber > 0


def test_what_cannot_be_distilled_is_said_in_a_sentence(base, tmp_path):
    with pytest.raises(UserError, match="codi has no teacher to guide; leave it out"):
        distill_recipe(base, "student", asked("codi", (2.0, 2.0)))
    with pytest.raises(UserError, match=r"--first-steps is 6; halved .* must become --steps \(4\)"):
        distill_runs(base, "student", tmp_path, asked("progressive"), 6)
    done = distill_recipe(base, "student", asked())
    make_checkpoint(tmp_path / "done", done)
    with pytest.raises(UserError, match=r"is distilled already \(consistency\)"):
        distill_recipe(tmp_path / "done", "again", asked())
    with pytest.raises(UserError, match="has guidance folded in already and knows nothing without"):
        distill_recipe(tmp_path / "done", "again", asked("progressive", (2.0, 2.0)))
    with pytest.raises(UserError, match="would lose its few steps"):
        superres_recipe(tmp_path / "done", SuperResConfig(factor=2), "x2", 8, 8, 1e-3)
    pipeline = load_pipeline(tmp_path / "done", torch.device("cpu"))
    changed = pipeline.config.sampling.model_copy(update={"guidance": 3.0})
    with pytest.raises(UserError, match=r"guidance is 3; .* it must be 1, as guidance is folded in already"):
        pipeline.draw(["a red circle"], 0, [0], changed)
    plain = config_of()
    plain = plain.model_copy(update={"model": plain.model.model_copy(update={"condition": "none"})})
    make_checkpoint(tmp_path / "none", plain)
    with pytest.raises(UserError, match="has no condition to leave out"):
        distill_recipe(tmp_path / "none", "guided", asked("guided"))
    plain = config_of()
    plain = plain.model_copy(update={"model": plain.model.model_copy(update={"guidance_input": True})})
    make_checkpoint(tmp_path / "scaled", plain)
    with pytest.raises(UserError, match="was not distilled, so no scale means anything"):
        distill_recipe(tmp_path / "scaled", "x", asked())
    with pytest.raises(
        UserError, match=r"steps is 20000; it must be a whole number of at least 1 and at most 10000"
    ):
        distill_recipe(base, "x", asked(steps=20_000))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--method", "magic"], "--method is 'magic'; choose from consistency, codi, guided, progressive"),
        (["--lr", "0"], "--lr is 0; it must be above 0"),
        (["--guidance", "1", "--guidance", "2", "--guidance", "3"], "give one scale or two"),
        (["--guidance", "-1"], "give one scale or two, each 0 or more"),
    ],
)
def test_wrong_options(base, words, sentence):
    done = CliRunner().invoke(app, ["adapt", "distill", str(base), *words])
    assert sentence in str(done.exception)
