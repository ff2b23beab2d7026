"""Super-resolution: degradation, paired figures, step 0, training, tiles, and the protocols of crops."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from run_folders import config_of
from shoestring.adapt.superres import superres_recipe, upscale
from shoestring.cli.main import app
from shoestring.config import SuperResConfig, TokensConfig, UNetConfig, apply_overrides
from shoestring.data import degradation
from shoestring.data.degradation import (
    FIRST,
    bell_kernel,
    blur_kernel,
    degrade,
    enlarged,
    sinc_kernel,
)
from shoestring.evaluation.paired import feature_distance, psnr, ssim
from shoestring.interfaces import Conditioning
from shoestring.models.files import ModelFacts, build_network, save_model
from shoestring.runtime import UserError, stream
from shoestring.sampling.generate import load_pipeline
from shoestring.sampling.lowres import low_latents, made_small, training_image
from shoestring.training.starting import initial_weights

UNET = UNetConfig(kind="unet", in_channels=3, channels=8, caption_dim=256, patch_size=2, mask_captions=True)


def photo(side=48, seed=0):
    """Smooth waves, a bit of noise and an edge."""
    draw = np.random.default_rng(seed)
    ys, xs = np.mgrid[0:side, 0:side] / side
    waves = [np.sin(6.3 * (a * xs + b * ys)) for a, b in draw.uniform(0.5, 3, size=(3, 2))]
    x = np.stack(waves) * 60 + 128 + 40 * (xs > 0.5) + draw.normal(0, 4, (3, side, side))
    return torch.from_numpy(x.clip(0, 255).astype(np.uint8))


# -- degradation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bicubic", "realesrgan"])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_picture_is_made_small_in_the_same_way_every_time(kind, factor):
    first, again = (degrade(photo(), factor, kind, 1, 7) for _ in range(2))
    assert first.dtype == torch.uint8
    assert first.shape == (3, 48 // factor, 48 // factor)
    assert torch.equal(first, again)
    if kind == "realesrgan":
        assert not torch.equal(first, degrade(photo(), factor, kind, 1, 8))
        assert not torch.equal(first, degrade(photo(), factor, kind, 2, 7))


def test_the_second_round_works_at_about_the_final_size(monkeypatch):
    sizes = []
    resized = degradation._resized

    def noted(x, size, mode):
        sizes.append(size[0])
        return resized(x, size, mode)

    monkeypatch.setattr(degradation, "_resized", noted)
    for number in range(40):
        degrade(photo(64), 4, "realesrgan", 0, number)
    first, second = sizes[0::3], sizes[1::3]
    assert set(sizes[2::3]) == {16}
    assert min(first) >= 0.15 * 64 - 1
    assert max(first) <= 1.5 * 64 + 1
    assert min(second) >= 0.3 * 16 - 1
    assert max(second) <= 1.2 * 16 + 1
    assert max(first) > 64 > min(first)
    assert max(second) > 16 > min(second)


def test_bicubic_is_pillows():
    expected = Image.fromarray(photo().permute(1, 2, 0).numpy()).resize((12, 12), Image.Resampling.BICUBIC)
    assert np.array_equal(degrade(photo(), 4, "bicubic", 0, 0).permute(1, 2, 0).numpy(), np.asarray(expected))


def test_the_published_pipeline_hurts_more_than_resizing_and_keeps_the_brightness():
    sources = [photo(64, seed) for seed in range(24)]
    plain = torch.stack([degrade(p, 4, "bicubic", 0, i) for i, p in enumerate(sources)])
    real = torch.stack([degrade(p, 4, "realesrgan", 0, i) for i, p in enumerate(sources)])
    truth = torch.stack(sources)
    assert psnr(enlarged(real, 4), truth).mean() < psnr(enlarged(plain, 4), truth).mean() - 3
    assert real.float().mean() == pytest.approx(plain.float().mean().item(), abs=6)


def test_kernels_sum_to_one_and_are_what_they_are_called():
    draw = np.random.default_rng(0)
    for _ in range(60):
        kernel = blur_kernel(FIRST, draw)
        assert kernel.shape[0] == kernel.shape[1]
        assert kernel.shape[0] in range(7, 22, 2)
        assert kernel.sum() == pytest.approx(1)
        assert np.allclose(kernel, kernel[::-1, ::-1])  # symmetric, so correlation is convolution
    xs = np.arange(21) - 10
    gauss = np.exp(-(xs[:, None] ** 2 + xs[None, :] ** 2) / (2 * 2.0**2))
    assert np.allclose(bell_kernel(21, (2.0, 2.0), 0.3, 1.0), gauss / gauss.sum())
    turned = bell_kernel(21, (1.0, 3.0), math.pi / 2, 1.0)
    assert np.allclose(turned, bell_kernel(21, (3.0, 1.0), 0.0, 1.0), atol=1e-12)
    flat = bell_kernel(21, (3.0, 3.0), 0.0, 2.0, plateau=True)
    assert flat[10, 11] / flat[10, 10] > 0.98
    low = np.abs(np.fft.fft2(sinc_kernel(21, math.pi / 2), s=(64, 64)))
    assert low[0, 24] < 0.2 < 0.8 < low[0, 6]  # passes a quarter of the band, stops three quarters


# -- figures ----------------------------------------------------------------------------------------------


def test_psnr_and_ssim_are_those_of_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional.image")
    real = torch.stack([photo(48, seed) for seed in range(3)])
    made = enlarged(torch.stack([degrade(p, 2, "bicubic", 0, 0) for p in real]), 2)
    for i in range(3):
        a, b = made[i : i + 1].double(), real[i : i + 1].double()
        expected = metrics.peak_signal_noise_ratio(a, b, data_range=255.0)
        assert psnr(made, real)[i] == pytest.approx(expected.item(), rel=1e-6)
        # Theirs goes on where the window does not fit, over mirrored borders; Wang's and ours do not.
        _, full = metrics.structural_similarity_index_measure(
            a, b, data_range=255.0, sigma=1.5, kernel_size=11, return_full_image=True
        )
        assert ssim(made, real)[i] == pytest.approx(full[..., 5:-5, 5:-5].mean().item(), abs=2e-6)
    assert psnr(real, real).isinf().all()
    assert torch.allclose(ssim(real, real), torch.ones(3, dtype=torch.float64))
    assert feature_distance(torch.eye(2), torch.eye(2).flip(0)).tolist() == [1.0, 1.0]


# -- step 0 and training ----------------------------------------------------------------------------------


def save_base(folder, model=None):
    """A model with every weight drawn, none of them zero."""
    config = config_of()
    changes = {"tokens": TokensConfig(method="dense"), "name": "base"}
    if model is not None:
        changes["model"] = model
    config = config.model_copy(update=changes)
    stage = config.stages[1].model_copy(update={"resolution": 24})
    config = config.model_copy(update={"stages": (stage,)})
    network = build_network(config, stream(0, "init"))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: p.detach() + 0.02 * torch.randn(p.shape, generator=generator)
        for name, p in network.named_parameters()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / "ema.safetensors", tensors, config, ModelFacts(1000, "ema", 0.5, 1.0, 24))
    return folder / "ema.safetensors"


@pytest.fixture(scope="module", params=["microdit", "unet"])
def base(request, tmp_path_factory):
    return save_base(tmp_path_factory.mktemp(request.param), UNET if request.param == "unet" else None)


def test_step_zero_is_exactly_the_base(base):
    config = superres_recipe(base, SuperResConfig(factor=2), "small", 64, 8, 1e-3)
    network = build_network(config, stream(1, "init"))
    initial_weights(config, network)
    original = load_pipeline(base, torch.device("cpu")).denoiser.network
    x, time = torch.randn(2, 3, 24, 24), torch.rand(2)
    told = Conditioning(torch.randn(2, 4, 256), torch.ones(2, 4, dtype=torch.bool))
    image = Conditioning(told.text_BSD, told.text_mask_BS, image=torch.randn(2, 3, 24, 24))
    with torch.no_grad():
        plain = original(x, time, told).visible_BKG
        assert plain.abs().max() > 0
        assert torch.equal(network.eval()(x, time, image).visible_BKG, plain)
        assert torch.equal(network(x, time, network.prepare(image)).visible_BKG, plain)


def test_the_small_picture_stays_when_the_caption_goes():
    image = torch.arange(2.0)[:, None, None, None].expand(2, 3, 4, 4)
    told = Conditioning(torch.ones(2, 3, 5), torch.ones(2, 3, dtype=torch.bool), image=image)
    assert torch.equal(told.null().image, image)
    assert torch.equal(told.drop(torch.tensor([True, False])).image, image)
    assert told.part(slice(1, 2)).image.unique().tolist() == [1.0]
    assert told.cat(told.null()).image.shape[0] == 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base, and a few steps of super-resolution by the command."""
    folder = tmp_path_factory.mktemp("superres")
    base = save_base(folder / "base")
    words = [
        "--factor",
        "2",
        "--degradation",
        "bicubic",
        "--nimg",
        "64",
        "--batch",
        "8",
        "--lr",
        "1e-3",
        "data.max_captions=40",
    ]
    done = CliRunner().invoke(app, ["adapt", "superres", str(base), "--out", str(folder / "run"), *words])
    assert done.exception is None, done.output
    return folder / "run"


def test_a_run_learns_from_small_pictures_and_shows_them(trained):
    pipeline = load_pipeline(trained, torch.device("cpu"))
    assert pipeline.config.superres == SuperResConfig(factor=2, degradation="bicubic")
    assert pipeline.config.name == "base-x2"
    weight = pipeline.denoiser.network.image_embedder.proj.weight
    assert weight.abs().max() > 0
    grids = sorted((trained / "progress").glob("*.png"))
    assert grids
    low = torch.stack([photo(12, seed) for seed in range(2)])
    made = pipeline.draw(["", ""], 0, [0, 1], pipeline.config.sampling, low=low)
    other = pipeline.draw(["", ""], 0, [0, 1], pipeline.config.sampling, low=low.flip(0))
    assert made.shape == (2, 3, 24, 24)
    assert not torch.equal(made, other)


def test_noise_on_the_small_picture_depends_on_the_number_only(trained):
    pipeline = load_pipeline(trained, torch.device("cpu"))
    x0 = torch.randn(3, 3, 24, 24).clamp(-1, 1)
    noisy = SuperResConfig(factor=2, noise=0.5, degradation="bicubic")
    whole = training_image(x0, pipeline.codec, noisy, 3, [5, 6, 7])
    assert torch.equal(whole[1:2], training_image(x0[1:2], pipeline.codec, noisy, 3, [6]))
    still = training_image(
        x0, pipeline.codec, SuperResConfig(factor=2, noise=0, degradation="bicubic"), 3, [5, 6, 7]
    )
    small = made_small(
        pipeline.codec.decode(x0), SuperResConfig(factor=2, degradation="bicubic"), 3, [5, 6, 7]
    )
    assert torch.equal(still, low_latents(small, 2, pipeline.codec))
    assert not torch.equal(still, whole)


def test_a_large_picture_is_enlarged_in_tiles(trained, tmp_path):
    pipeline = load_pipeline(trained, torch.device("cpu"))
    seen = []
    made = upscale(pipeline, photo(34)[:, :24], 0, 1, lambda done, total: seen.append((done, total)))
    assert made.shape == (3, 48, 68)
    assert seen[-1] == (9, 9)  # 3 rows and 3 columns of tiles of 12 pixels that share one
    Image.fromarray(photo(20).permute(1, 2, 0).numpy()).save(tmp_path / "cat.png")
    words = [
        "upscale",
        str(trained),
        str(tmp_path / "cat.png"),
        "--out",
        str(tmp_path / "large"),
        "--overlap",
        "1",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exception is None, done.output
    assert Image.open(tmp_path / "large" / "cat-x2.png").size == (40, 40)


def test_tiles_of_a_constant_model_leave_no_seams(trained, monkeypatch):
    pipeline = load_pipeline(trained, torch.device("cpu"))
    monkeypatch.setattr(type(pipeline), "draw", lambda *_, low, **__: enlarged(low, 2), raising=True)
    flat = torch.full((3, 31, 20), 77, dtype=torch.uint8)
    assert upscale(pipeline, flat, 0, 2).unique().tolist() == [77]


# -- protocols --------------------------------------------------------------------------------------------


def evaluated(run, *words):
    done = CliRunner().invoke(app, ["eval", str(run), *words])
    if done.exception is not None:
        raise done.exception
    (result,) = sorted((run / "eval").glob("*/result.json"), key=lambda path: path.stat().st_mtime)[-1:]
    return json.loads(result.read_text())


def test_the_protocol_of_held_out_pictures(trained):
    metrics = "metrics=[psnr, feature-distance, kid-efflite0]"
    found = evaluated(trained, "--protocol", "superres", "count=12", metrics)
    figures = found["figures"]
    assert set(figures) >= {"psnr", "psnr_bicubic", "psnr_made_small", "feature_distance", "kid_efflite0"}
    assert 5 < figures["psnr"]["value"] < 40
    assert figures["psnr_bicubic"]["value"] > figures["psnr"]["value"]  # after eight steps
    assert found["facts"]["crops"]["factor"] == 2


def test_div2k_in_all_but_its_pictures(trained, tmp_path):
    """Crops of whole pictures at fixed places, made small by the published pipeline."""
    for seed in range(3):
        Image.fromarray(photo(40, seed).permute(1, 2, 0).numpy()).save(tmp_path / f"{seed}.png")
    words = (
        "--protocol",
        "div2k-sr",
        f"crops_folder={tmp_path}",
        "count=10",
        "metrics=[psnr]",
        "micro_batch=4",
    )
    first = evaluated(trained, *words, "sampling.steps=2")
    assert first["facts"]["crops"] == {**first["facts"]["crops"], "pictures": 3, "degradation": "realesrgan"}
    again = evaluated(trained, *words, "sampling.steps=3")
    assert first["facts"]["crops"] == again["facts"]["crops"]
    assert first["figures"]["psnr_bicubic"] == again["figures"]["psnr_bicubic"]
    assert first["figures"]["psnr"] != again["figures"]["psnr"]


# -- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--protocol", "demo"], "enlarges pictures; protocols of crops"),
        (["--protocol", "div2k-sr", "metrics=[psnr]"], "crops_folder: DIV2K_valid_HR is not a folder"),
        (["--protocol", "superres", "count=100000", "metrics=[psnr]"], "count is 100,000, but"),
        (["--protocol", "superres", "seeds=[1,2]"], "prompts=crops needs one seed"),
        (["--protocol", "superres", "metrics=[loss]"], "metric loss is not for prompts=crops"),
    ],
)
def test_wrong_protocols_are_a_sentence(trained, words, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluated(trained, *words)


def test_a_model_of_words_enlarges_nothing(trained, tmp_path):
    base = trained.parent / "base"
    pipeline = load_pipeline(base, torch.device("cpu"))
    with pytest.raises(UserError, match="draws from words and does not enlarge"):
        upscale(pipeline, photo(16), 0, 1)
    with pytest.raises(UserError, match="draws from words, and a small picture is given"):
        pipeline.draw([""], 0, [0], pipeline.config.sampling, low=photo(12)[None])
    with pytest.raises(UserError, match="draws from words; protocols of crops"):
        evaluated(base, "--protocol", "superres")
    small = load_pipeline(trained, torch.device("cpu"))
    with pytest.raises(UserError, match="draws nothing from words alone"):
        small.draw([""], 0, [0], small.config.sampling)


@pytest.mark.parametrize(
    ("side", "sentence"),
    [(24, "is not smaller than what the model draws"), (9, "this model draws 24 px from 12 px")],
)
def test_small_pictures_of_a_wrong_size_are_refused(trained, side, sentence):
    pipeline = load_pipeline(trained, torch.device("cpu"))
    with pytest.raises(UserError, match=sentence):
        pipeline.draw([""], 0, [0], pipeline.config.sampling, low=photo(side)[None])


def test_pictures_and_overlaps_that_do_not_fit_are_refused(trained, tmp_path):
    pipeline = load_pipeline(trained, torch.device("cpu"))
    with pytest.raises(UserError, match="enlarges tiles of 12, so it needs at least that"):
        upscale(pipeline, photo(3), 0, 1)
    twice = ["upscale", str(trained), str(tmp_path / "a" / "0.png"), str(tmp_path / "b" / "0.png")]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(photo(20).permute(1, 2, 0).numpy()).save(tmp_path / folder / "0.png")
    assert "several pictures are called 0" in str(CliRunner().invoke(app, twice).exception)
    with pytest.raises(UserError, match="--overlap is 12"):
        upscale(pipeline, photo(16), 0, 12)
    (tmp_path / "crops").mkdir()
    Image.fromarray(photo(6).permute(1, 2, 0).numpy()).save(tmp_path / "crops" / "small.png")
    with pytest.raises(UserError, match=r"small\.png has 6 x 6 pixels, and crops have 24"):
        evaluated(
            trained, "--protocol", "div2k-sr", f"crops_folder={tmp_path}/crops", "count=2", "metrics=[psnr]"
        )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--factor 3", "--factor is 3"),
        ("--noise 3", "--noise is 3"),
        ("--lr 0", "--lr is 0"),
        ("--lr inf", "must be finite"),
        ("--name a/b", "name is"),
        ("--degradation blur", "--degradation is 'blur'"),
    ],
)
def test_wrong_options_are_a_sentence(trained, words, sentence):
    done = CliRunner().invoke(app, ["adapt", "superres", str(trained.parent / "base"), *words.split()])
    assert sentence in str(done.exception)


def test_a_model_that_enlarges_is_not_adapted_again(trained):
    with pytest.raises(UserError, match="enlarges pictures already"):
        superres_recipe(trained, SuperResConfig(), "again", 64, 8, 1e-3)


def test_settings_that_do_not_go_together_are_a_sentence(base):
    config = superres_recipe(base, SuperResConfig(factor=2), "small", 64, 8, 1e-3)
    for override, sentence in (
        ("superres=null", r"model\.image_channels is 3, but superres is not set; set it to 0"),
        ("model.image_channels=0", r"model\.image_channels is 0, but superres is set; set it to 3"),
        ("logging.kid_nimg=100", r"logging\.kid_nimg is set"),
        ("superres.factor=3", r"superres\.factor is 3"),
    ):
        with pytest.raises(UserError, match=sentence):
            apply_overrides(config, [override])
