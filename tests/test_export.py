"""Export: one file, int8 and bf16, released layouts, cards, pushing, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from exports import CLASSES, EXPERTS, UNET, trained, variant
from run_folders import make_checkpoint, make_run
from shoestring.cli.main import app
from shoestring.config import SuperResConfig
from shoestring.evaluation.digests import file_digest
from shoestring.export.card import TO_FILL, model_card
from shoestring.export.file import export_file
from shoestring.export.program import export_torch
from shoestring.export.push import collect
from shoestring.export.source import open_source
from shoestring.models.files import load_model, read_header
from shoestring.models.quantise import SCALE, quantised, restored
from shoestring.models.released import read_released
from shoestring.runtime import UserError
from shoestring.sampling.generate import load_pipeline

PLAIN = variant({"dim": 128, "head_dim": 32, "depth": 3, "mixer": {"depth": 1, "dim": 128}})
PROMPTS = ["a red circle", "a blue square"]


def command(*words) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def drawn(path):
    pipeline = load_pipeline(path, torch.device("cpu"))
    return pipeline.draw(PROMPTS, 0, [0, 1], pipeline.config.sampling)


# -- one file ----------------------------------------------------------------------------------------------


def test_one_file_is_the_whole_model(tmp_path):
    source = trained(tmp_path / "run", variant(CLASSES), classes=("cat", "dog"))
    export_file(source, tmp_path / "model.safetensors")
    config, network, facts = load_model(tmp_path / "model.safetensors")
    assert (config, facts) == (source.config, source.facts)
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), source.network.parameters(), strict=True)
    )
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        header = file.metadata()
    assert json.loads(header["statistics"]) == {"sigma_data": 0.5, "resolution": 8, "nimg": 1000}
    assert header["card"] == model_card(source, "file")
    assert read_header(tmp_path / "model.safetensors").card == header["card"]


def test_statistics_of_latents_are_in_the_file(tmp_path):
    from test_export_pipeline import STAGES, tiny_autoencoder

    data = {
        "codec": "autoencoder-kl",
        "codec_path": str(tiny_autoencoder(tmp_path / "vae", scaling_factor=0.25)),
    }
    source = trained(tmp_path / "run", variant({"in_channels": 4, "patch_size": 2}, data=data, stages=STAGES))
    export_file(source, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        found = json.loads(file.metadata()["statistics"])
    assert (found["latent_shift"], found["latent_scale"]) == ([0.0], [0.25])


def test_the_file_draws_what_the_run_draws(tmp_path):
    source = trained(tmp_path / "run", PLAIN)
    command("export", tmp_path / "run")
    file = tmp_path / "run" / "export" / "tiny.safetensors"
    assert torch.equal(drawn(file), drawn(tmp_path / "run"))
    command("sample", file, "-p", "a red circle", "--seed", 0, "--out", tmp_path / "samples")
    with Image.open(next((tmp_path / "samples").glob("00000*.png"))) as picture:
        assert picture.size == (8, 8)
    assert source.run == tmp_path / "run"


# -- int8 and bf16 -----------------------------------------------------------------------------------------


def test_factors_are_exported_inside_the_weights(tmp_path):
    config = variant(lora={"rank": 4, "targets": ["*attn*", "*mlp*"]})
    make_checkpoint(tmp_path / "run", config)
    source = open_source(tmp_path / "run", None, False)
    assert source.config.lora is None
    assert not any("lora" in name for name, _ in source.network.named_parameters())
    export_file(source, tmp_path / "model.safetensors")
    ours, made = drawn(tmp_path / "run"), drawn(tmp_path / "model.safetensors")
    assert (ours.float() - made.float()).abs().max() <= 1  # of 255: rounding of merged products
    plain = variant()
    make_checkpoint(tmp_path / "rum", plain)  # a name as long: the same weights are drawn
    assert not torch.equal(drawn(tmp_path / "rum"), made)


def test_int8_is_at_most_three_tenths_and_close(tmp_path):
    source = trained(tmp_path / "run", PLAIN)
    sizes, pictures = {}, {}
    for precision in ("fp32", "bf16", "int8"):
        file = tmp_path / f"{precision}.safetensors"
        export_file(source, file, precision)
        tensors = read_header(file, None).tensors
        sizes[precision] = file.stat().st_size
        pictures[precision] = drawn(file).float()
        assert not [name for name in tensors if name.endswith(SCALE)]
    # Header and card, which weigh nothing beside a real model, are 20 kB of 2.6 MB here.
    assert sizes["int8"] <= 0.30 * sizes["fp32"]
    assert sizes["bf16"] <= 0.52 * sizes["fp32"]
    spread = pictures["fp32"].std()
    errors = {
        name: (each - pictures["fp32"]).square().mean().sqrt() / spread for name, each in pictures.items()
    }
    assert 0 < errors["bf16"] < 0.1
    assert 0 < errors["int8"] < 0.2


@pytest.mark.parametrize("shape", [(6, 10), (3, 10, 6), (4, 3, 2, 2)])
def test_no_weight_is_off_by_more_than_half_a_step(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, shape[-1])
    tensors = quantised({"w": weight})
    assert tensors["w"].dtype == torch.int8
    step = tensors[f"w{SCALE}"]
    assert step.numel() == {2: 6, 3: 18, 4: 4}[len(shape)]  # output channels; of every expert its own
    error = (restored(tensors)["w"] - weight).abs()
    assert (error <= 0.5001 * step).all()
    inputs = 1 if len(shape) == 3 else tuple(range(1, len(shape)))
    assert torch.allclose(step * 127, weight.abs().amax(dim=inputs, keepdim=True))


def test_what_is_small_or_chooses_stays_exact():
    shapes = {"norm.weight": (8,), "w.bias": (8,), "mlp.gate.weight": (4, 8), "mask_token": (1, 1, 8)}
    tensors = {name: torch.randn(shape) for name, shape in (shapes | {"pos_embed": (1, 4, 8)}).items()}
    found = quantised(tensors)
    assert found.keys() == tensors.keys()
    assert all(found[name] is tensors[name] for name in tensors)
    assert not restored(quantised({"zero": torch.zeros(3, 4)}))["zero"].any()


def test_an_int8_file_can_be_begun_with(tmp_path):
    from shoestring.models.files import build_network
    from shoestring.training.starting import initial_weights

    source = trained(tmp_path / "run", variant(EXPERTS))
    export_file(source, tmp_path / "model.safetensors", "int8")
    config = source.config.model_copy(update={"initial_weights": str(tmp_path / "model.safetensors")})
    network = build_network(config)
    initial_weights(config, network)
    for (name, a), b in zip(network.named_parameters(), source.network.parameters(), strict=True):
        assert (a - b).abs().max() <= b.abs().max() / 250, name


# -- released layouts --------------------------------------------------------------------------------------


def test_released_layouts_come_back(tmp_path, mistake):
    config = variant({"qk_norm": True, "condition": "text", "mask_captions": False})
    source = trained(tmp_path / "run", config)
    command("export", tmp_path / "run", "--to", "released")
    again = read_released(tmp_path / "run" / "export" / "released" / "weights.safetensors", config.model)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), source.network.parameters(), strict=True)
    )
    assert again.pos_embed is not None
    assert again.pos_embed.shape == (1, 4, 32)
    command("export", tmp_path / "run", "--to", "released", "--out", tmp_path / "w.pt")
    said = mistake("export", tmp_path / "run", "--to", "released", "--out", tmp_path / "w.pt")
    assert "w.pt exists; choose another --out" in said
    trained(tmp_path / "unet", variant(UNET))
    assert "only microdit and maskdit have" in mistake("export", tmp_path / "unet", "--to", "released")


# -- cards -------------------------------------------------------------------------------------------------


def test_the_card_holds_what_the_run_knows_and_nothing_else(tmp_path):
    from huggingface_hub import ModelCard

    source = trained(tmp_path / "run", variant())
    text = model_card(source, "diffusers")
    card = ModelCard(text)
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert card.data.license_name == TO_FILL.replace(" ", "-")
    for words in (
        "| images seen | 1,000 |",
        "| time | 1 min 40 s |",  # ten images a second in the log
        "| cost | $1.00 at $36 an hour |",
        "| training FLOPs | not recorded |",
        "| masked | 600 | 10 | 8 | 50% | 0.002 |",
        "Not evaluated",
        f"* Weights: **{TO_FILL}**",
    ):
        assert words in text
    assert str(tmp_path) not in text
    free = source.config.logging.model_copy(update={"usd_per_hour": 0.0})
    other = replace(source, config=source.config.model_copy(update={"logging": free}), run=None)
    text = model_card(other, "file")
    assert "| cost | not recorded |" in text
    assert "$" not in text


def test_figures_of_the_card_are_those_of_these_weights(tmp_path):
    source = trained(tmp_path / "run", variant())
    sampling = {"sampler": "heun", "steps": 18, "guidance": 3.0}
    for name, digest in (("mine", file_digest(source.file)), ("old", "0" * 32)):
        folder = tmp_path / "run" / "eval" / f"{name}-1"
        folder.mkdir(parents=True)
        figures = {"kid": {"value": 0.0123}, "fd": {"value": 45.678, "low95": 40.0, "high95": 50.0}}
        result = {
            "protocol": {"name": name}, "facts": {"pictures": 256, "sampling": sampling},
            "model": {"digest": digest}, "figures": figures | {"recall": {"value": 0.5}},
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
    (tmp_path / "run" / "eval" / "begun-1").mkdir()
    (tmp_path / "run" / "eval" / "begun-1" / "result.json").write_text("{")
    text = model_card(source, "file")
    assert "| mine | 256 | heun, 18 steps, guidance 3 | fd | 45.68 [40, 50] |" in text
    assert "recall (higher is better) | 0.5 |" in text
    assert "| old |" not in text
    assert "1 more evaluations in the run folder are of other weights" in text
    found = yaml.safe_load(text.split("---")[1])["model-index"][0]["results"]
    assert [each["dataset"]["name"] for each in found] == ["shapes, protocol mine"]
    assert found[0]["metrics"][0] == {"type": "kid", "name": "kid", "value": 0.0123}


def test_a_card_alone_is_not_overwritten(tmp_path, mistake):
    trained(tmp_path / "run", variant())
    command("export", tmp_path / "run", "--to", "card", "--out", tmp_path / "card.md")
    assert "## Limits" in (tmp_path / "card.md").read_text()
    said = mistake("export", tmp_path / "run", "--to", "card", "--out", tmp_path / "card.md")
    assert "card.md exists and may have been filled in by hand" in said


# -- pushing -----------------------------------------------------------------------------------------------


def test_a_dry_run_lists_what_would_go_there_without_a_network(tmp_path, monkeypatch):
    trained(tmp_path / "run", variant())

    def no_network(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", no_network)
    command("export", tmp_path / "run")
    said = command("push", tmp_path / "run" / "export" / "tiny.safetensors", "me/tiny", "--dry-run")
    assert "To me/tiny:" in said
    assert "fields that are to be filled in" in said
    size = (tmp_path / "run" / "export" / "tiny.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in said
    command("export", tmp_path / "run", "--to", "released")
    said = command("push", tmp_path / "run" / "export" / "released", "me/tiny", "--dry-run")
    for name in ("README.md", "shoestring.json", "weights.safetensors"):
        assert name in said


def test_pushing_without_token_or_network_is_one_sentence(tmp_path, mistake, monkeypatch):
    trained(tmp_path / "run", variant())
    command("export", tmp_path / "run")
    file = tmp_path / "run" / "export" / "tiny.safetensors"
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "cannot push to me/tiny: " in mistake("push", file, "me/tiny")


def test_only_exports_of_ours_with_a_card_are_pushed(tmp_path, mistake):
    trained(tmp_path / "run", variant())
    assert "is no export of shoestring" in mistake("push", tmp_path / "run", "me/tiny")
    model = next((tmp_path / "run").rglob("ema.safetensors"))
    assert "has no card inside" in mistake("push", model, "me/tiny")
    assert "does not exist" in mistake("push", tmp_path / "nothing", "me/tiny")
    command("export", tmp_path / "run", "--to", "released", "--out", tmp_path / "out")
    assert "'tiny' is no name of a repository; it is OWNER/NAME" in mistake("push", tmp_path / "out", "tiny")
    assert "is no name of a repository" in mistake("push", tmp_path / "out", "me/ti ny")
    (tmp_path / "out" / "README.md").unlink()
    assert "has no README.md; a model needs a card" in mistake("push", tmp_path / "out", "me/tiny")
    with pytest.raises(UserError, match="has no README"):
        collect(tmp_path / "out")


# -- what is refused ---------------------------------------------------------------------------------------


def test_an_unfinished_run_is_exported_only_if_told_to(tmp_path, mistake):
    config = variant()
    make_run(tmp_path / "run", config, until=400)
    make_checkpoint(tmp_path / "run", config, nimg=400)
    for kind in ("file", "diffusers", "onnx", "torch", "released", "card"):
        said = mistake("export", tmp_path / "run", "--to", kind)
        assert "has seen 400 of its run's 1,000 images; let the run finish, or export it" in said
    assert not (tmp_path / "run" / "export").exists()
    command("export", tmp_path / "run", "--unfinished")
    card = read_header(tmp_path / "run" / "export" / "tiny.safetensors").card
    assert card is not None
    assert "The run is not finished: 400 of 1,000 images seen" in card


def test_mistakes_are_one_sentence_each(tmp_path, mistake, monkeypatch):
    run = tmp_path / "run"
    source = trained(run, variant())
    assert "--to is 'gguf'; choose from file, diffusers" in mistake("export", run, "--to", "gguf")
    assert "--to onnx knows fp32 only" in mistake("export", run, "--to", "onnx", "--precision", "int8")
    assert "--precision is 'int4'; choose from" in mistake("export", run, "--precision", "int4")
    assert "settings begin with sampling." in mistake("export", run, "model.dim=3")
    assert "a model file ends in .safetensors" in mistake("export", run, "--out", tmp_path / "x.bin")
    (tmp_path / "notes.safetensors").write_text("mine")
    said = mistake("export", run, "--out", tmp_path / "notes.safetensors")
    assert "is no model file of shoestring, so it is not replaced" in said
    assert (tmp_path / "notes.safetensors").read_text() == "mine"
    enlarging = replace(source, config=source.config.model_copy(update={"superres": SuperResConfig()}))
    with pytest.raises(UserError, match="enlarges pictures, and programs draw from words only"):
        export_torch(enlarging, tmp_path / "out")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    said = mistake("export", run, "--to", "onnx")
    assert "--to onnx needs the package onnxruntime; run: pip install 'shoestring[export]'" in said


def test_sampling_settings_given_become_the_defaults(tmp_path):
    trained(tmp_path / "run", variant())
    command("export", tmp_path / "run", "sampling.steps=7", "--out", tmp_path / "m.safetensors")
    assert load_model(tmp_path / "m.safetensors")[0].sampling.steps == 7
    source = open_source(tmp_path / "run", None, False, ["sampling.sampler=dpmpp-2m"])
    assert source.config.sampling.sampler == "dpmpp-2m"
