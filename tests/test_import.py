"""Import: released weights as a run that is sampled, evaluated and begun with."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from exports import UNET, variant
from run_folders import config_of
from shoestring.adapt.superres import superres_recipe
from shoestring.cli.main import app
from shoestring.config import DecoderConfig, RunConfig, SamplingConfig, SuperResConfig, load_yaml, to_yaml
from shoestring.diffusion.process import build_process
from shoestring.interfaces import Conditioning
from shoestring.models.files import build_network, find_model, load_model
from shoestring.models.released_config import config_from_released, maskdit_config
from shoestring.runtime import stream
from shoestring.sampling.generate import load_pipeline, sample_latents
from shoestring.training.folder import checkpoint_folders
from shoestring.training.starting import initial_weights, scale_of_latents
from test_export_pipeline import tiny_autoencoder

MASKDIT_SIZES = ("hidden_size", "depth", "num_heads", "patch_size", "in_channels", "num_classes")


def command(*words):
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


class Golden:
    """A golden model as a released file, with a recipe of its shape on latents of a tiny autoencoder."""

    def __init__(self, shared, kind, place):
        with safe_open(shared / "golden" / f"{kind}_a.safetensors", framework="pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.facts = file.metadata()
        self.file, self.recipe, self.kind = place / f"{kind}.safetensors", place / f"{kind}.yaml", kind
        weights = {
            name.removeprefix("weight."): t for name, t in self.tensors.items() if name[:7] == "weight."
        }
        save_file(weights, self.file)
        self.side = self.tensors["in.latents"].shape[-1]
        values = config_of().model_dump() | {"model": self.model().model_dump(), "name": f"golden-{kind}"}
        values["tokens"] = {"method": "deferred" if kind == "microdit" else "maskdit"}
        values["stages"] = [stage | {"resolution": 8 * self.side} for stage in values["stages"]]
        values["data"] |= {"codec": "autoencoder-kl", "codec_path": str(tiny_autoencoder(place / "vae"))}
        self.recipe.write_text(to_yaml(RunConfig.model_validate(values)))

    def model(self):
        if self.kind == "microdit":
            return config_from_released(self.facts)
        depth, width, heads = (int(self.facts[f"decoder_{what}"]) for what in ("depth", "width", "heads"))
        decoder = DecoderConfig(depth=depth, dim=width, head_dim=width // heads)
        return maskdit_config(*(int(self.facts[key]) for key in MASKDIT_SIZES), decoder)

    def condition(self):
        if self.kind == "microdit":
            return Conditioning(self.tensors["in.captions"])
        return Conditioning(class_B=self.tensors["in.class_index"])


@pytest.fixture(params=["microdit", "maskdit"])
def golden(request, shared, tmp_path):
    return Golden(shared, request.param, tmp_path)


def test_an_imported_run_draws_what_the_released_code_drew(golden, tmp_path):
    said = command("import", golden.file, "--recipe", golden.recipe, "--out", tmp_path / "run")
    config, network, facts = load_model(find_model(tmp_path / "run"))
    assert facts.sigma_data == float(golden.facts["sigma_data"])  # the file does not tell
    assert f"sigma_data {facts.sigma_data:g}" in said
    assert facts.resolution == 8 * golden.side
    assert (facts.nimg, facts.weights) == (config.nimg, "ema")
    process = build_process(config.process, facts.sigma_data)
    steps = int(golden.facts["heun_steps"])
    sampling = SamplingConfig(sampler="heun", steps=steps, guidance=float(golden.facts["cfg_scale"]))
    made = sample_latents(
        process.denoiser(network), process, golden.condition(), golden.tensors["in.latents"], sampling
    )
    expected = golden.tensors["out.sample_heun"]
    assert (made - expected).norm() <= 1e-4 * expected.norm()  # the tolerance of the golden file


def test_an_imported_run_is_begun_with(golden, tmp_path):
    run = tmp_path / "run"
    command("import", golden.file, "--recipe", golden.recipe, "--out", run)
    network = load_model(find_model(run))[1]
    for begin in (run, load_yaml(run / "config.yaml").initial_weights):
        config = load_yaml(run / "config.yaml").model_copy(update={"initial_weights": str(begin)})
        begun = build_network(config, stream(3, "test"))
        initial_weights(config, begun)
        assert all(torch.equal(a, b) for a, b in zip(begun.parameters(), network.parameters(), strict=True))
        assert scale_of_latents(config, tmp_path / "tuned", lambda: 0.1) == float(golden.facts["sigma_data"])
    tuned = superres_recipe(run, SuperResConfig(factor=2), "tuned", 100, 10, 1e-4)
    begun = build_network(tuned, stream(3, "test"))
    initial_weights(tuned, begun)  # all but the new weights for the small picture
    mine = dict(begun.named_parameters())
    assert all(torch.equal(mine[name], p) for name, p in network.named_parameters())


def test_an_imported_run_is_sampled_and_exported(shared, tmp_path):
    golden, run = Golden(shared, "maskdit", tmp_path), tmp_path / "run"
    command("import", golden.file, "--recipe", golden.recipe, "--out", run, "sampling.steps=3")
    command("sample", run, "-p", "1", "-p", "", "--seed", 0, "--out", tmp_path / "samples")
    assert len(list((tmp_path / "samples").glob("0000*.png"))) == 2
    assert load_pipeline(run, torch.device("cpu")).config.sampling.steps == 3
    command("export", run, "--to", "released", "--out", tmp_path / "again.safetensors")
    with (
        safe_open(golden.file, framework="pt") as before,
        safe_open(tmp_path / "again.safetensors", "pt") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        for name in before.keys():  # noqa: SIM118
            assert torch.equal(before.get_tensor(name), after.get_tensor(name)), name


def test_an_imported_run_is_evaluated(shared, tmp_path):
    golden, run = Golden(shared, "maskdit", tmp_path), tmp_path / "run"
    command("import", golden.file, "--recipe", golden.recipe, "--out", run, "sampling.steps=2")
    protocol = tmp_path / "p.yaml"
    (tmp_path / "classes.txt").write_text("0\n1\n")
    prompts = f"prompts: file\nprompts_file: {tmp_path}/classes.txt\n"
    protocol.write_text(f"name: tiny\n{prompts}metrics: [diversity]\nseeds: [0, 1]\n")
    words = ["eval", run, "--protocol", protocol]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    result = json.loads(next(run.glob("eval/tiny-*/result.json")).read_text())
    assert result["facts"]["pictures"] == 4


def test_what_cannot_be_imported_is_one_sentence(shared, tmp_path, mistake):
    golden = Golden(shared, "maskdit", tmp_path)
    words = ("import", golden.file, "--recipe", golden.recipe, "--out", tmp_path / "run")
    assert "process.kind=flow, but released MicroDiT and MaskDiT were trained with edm" in mistake(
        *words, "process.kind=flow"
    )
    assert "it is a checkpoint of another model" in mistake(*words, "model.depth=9")
    assert "missing.pt does not exist" in mistake("import", tmp_path / "missing.pt", *words[2:])
    unet = tmp_path / "unet.yaml"
    unet.write_text(to_yaml(variant(UNET)))
    said = mistake("import", golden.file, "--recipe", unet, "--out", tmp_path / "run")
    assert "has model.kind=unet; released weights are of microdit or maskdit" in said
    assert "--part is 'best'; choose from ema, model" in mistake(*words, "--part", "best")
    assert not (tmp_path / "run").exists()
    command(*words)
    assert "run exists; choose another --out" in mistake(*words)
    assert len(checkpoint_folders(tmp_path / "run")) == 1
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints", "config.yaml"]
