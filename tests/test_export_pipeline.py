"""Pipeline folders: the same pictures with diffusers alone, for every network, process and encoder."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exports import CLASSES, EXPERTS, MASKDIT, UNET, trained, variant
from shoestring.config import SamplingConfig
from shoestring.encoders.text import HashingText, build_text_encoder
from shoestring.export.pipeline import export_diffusers
from shoestring.export.source import open_source
from shoestring.interfaces import Conditioning
from shoestring.runtime import UserError
from shoestring.sampling.generate import initial_noise, load_pipeline, sample_latents
from shoestring.tensors import unpatchify
from test_encoders import clip_folder, t5_folder  # noqa: F401  (fixtures)

TOLERANCE = 1e-4
"""Of the largest latent: the contract. Both compute in float32, in another order at most."""


@pytest.fixture(autouse=True)
def _code_of_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where diffusers copies the code of folders to."""
    place = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(place))


def loaded(folder: Path):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def both(run: Path, folder: Path, prompts, negative=None):
    """Latents by shoestring and by diffusers, from the same noise."""
    own = load_pipeline(run, torch.device("cpu"))
    side = own.resolution // own.codec.downsampling
    noise = initial_noise(0, range(len(prompts)), (own.codec.channels, side, side))
    strong, weak = own._captions(list(prompts), negative)
    ours = sample_latents(own.denoiser, own.process, strong, noise, own.config.sampling, weak)
    pipeline = loaded(folder)
    made = pipeline(list(prompts), negative, latents=noise, output_type="latent").images
    drawn = torch.from_numpy(pipeline._pictures(made, "np")).permute(0, 3, 1, 2)
    # A value on the border of two bytes may fall to the other side.
    assert (drawn * 255 - own.codec.decode(ours)).abs().max() <= 1.001
    assert ours.std() > 0.05
    assert (ours[0] - ours[1]).abs().max() > 0.01  # prompts and noise matter
    return ours, made


def close(ours, made, tolerance=TOLERANCE) -> None:
    assert (ours - made).abs().max() <= tolerance * ours.abs().max()


@pytest.mark.parametrize(
    "config",
    [
        variant(EXPERTS | {"mixer": {"depth": 2, "dim": 16}, "head_dim": 8}),
        variant({"mask_captions": False, "depth": 4}, tokens={"method": "sprint", "first": 1, "last": -1}),
        variant({"depth": 4}, tokens={"method": "tread", "first": 1, "last": -1}, process={"kind": "flow"}),
        variant(MASKDIT | CLASSES, tokens={"method": "maskdit"}),
        variant(MASKDIT | {"condition": "none"}, tokens={"method": "maskdit"}),
        variant(MASKDIT | {"decoder": {"depth": 0}, "ffn_multipliers": [4.0]}, tokens={"method": "dense"}),
        variant(process={"kind": "ddpm", "prediction": "v", "zero_terminal_snr": True, "schedule": "cosine"}),
        variant(sampling={"guidance_interval": (0.1, 5.0), "spacing": "table", "steps": 6}),
        variant({"guidance_input": True}, sampling={"guidance": 3.0}),
    ],
    ids=[
        "experts",
        "sprint",
        "tread-flow",
        "maskdit-class",
        "maskdit-none",
        "dit-text",
        "ddpm-v",
        "interval",
        "distilled",
    ],
)
def test_transformers_draw_the_same_with_diffusers_alone(config, tmp_path):
    source = trained(tmp_path / "run", config, classes=("cat", "dog"))
    export_diffusers(source, tmp_path / "out")
    prompts = {"text": ["a red circle", "a blue square"], "class": ["dog", "3"], "none": ["", ""]}
    ours, made = both(tmp_path / "run", tmp_path / "out", prompts[config.model.condition])
    close(ours, made)


def test_every_sampler_without_fresh_noise_is_the_same(tmp_path):
    export_diffusers(trained(tmp_path / "run", variant()), tmp_path / "out")
    pipeline, own = loaded(tmp_path / "out"), load_pipeline(tmp_path / "run", torch.device("cpu"))
    noise, prompts = initial_noise(0, [0, 1], (3, 8, 8)), ["a red circle", ""]
    strong, weak = own._captions(prompts, "a blue square")
    results = {}
    for sampler in ("heun", "euler", "ddim", "dpmpp-2m", "dpmpp-3m", "dpmpp-2s", "dpmpp-3s", "unipc"):
        for steps in (1, 6, 7):
            sampling = SamplingConfig(sampler=sampler, steps=steps, guidance=3.0)
            ours = sample_latents(own.denoiser, own.process, strong, noise, sampling, weak)
            given = {"num_inference_steps": steps, "guidance_scale": 3.0, "sampler": sampler}
            made = pipeline(prompts, "a blue square", latents=noise, output_type="latent", **given).images
            close(ours, made)
            results[sampler, steps] = made
    assert (results["heun", 7] - results["euler", 7]).abs().max() > 0.01  # they are not all the same


@pytest.mark.parametrize("sampler", ["ddpm", "euler-ancestral", "dpmpp-2m-sde", "consistency"])
def test_samplers_with_fresh_noise_draw_it_from_the_generator(sampler, tmp_path):
    source = trained(tmp_path / "run", variant())
    export_diffusers(source, tmp_path / "out")
    own = load_pipeline(tmp_path / "run", torch.device("cpu"))
    noise = initial_noise(0, [0, 1], (3, 8, 8))
    draw = torch.Generator().manual_seed(5)
    fresh = [torch.randn(noise.shape, generator=draw) for _ in range(5)]
    strong, _ = own._captions(["a red circle", ""], None)
    sampling = SamplingConfig(sampler=sampler, steps=5, guidance=2.0)
    ours = sample_latents(own.denoiser, own.process, strong, noise, sampling, fresh=lambda step: fresh[step])
    made = loaded(tmp_path / "out")(
        ["a red circle", ""], latents=noise, sampler=sampler, num_inference_steps=5, guidance_scale=2.0,
        generator=torch.Generator().manual_seed(5), output_type="latent",
    ).images  # fmt: skip
    close(ours, made)


def test_bf16_is_drawn_as_it_was_trained(tmp_path):
    source = trained(tmp_path / "run", variant(precision="bf16"))
    export_diffusers(source, tmp_path / "out")
    ours, made = both(tmp_path / "run", tmp_path / "out", ["a red circle", ""])
    close(ours, made)  # the same operations in the same order, so that rounding is the same too
    exact = load_pipeline(tmp_path / "run", torch.device("cpu"))
    exact.denoiser.precision = torch.float32
    strong, _ = exact._captions(["a red circle", ""], None)
    noise = initial_noise(0, [0, 1], (3, 8, 8))
    other = sample_latents(exact.denoiser, exact.process, strong, noise, exact.config.sampling)
    assert (other - ours).abs().max() > 2 * TOLERANCE * ours.abs().max()  # it was low precision


# -- U-Nets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        variant(UNET | {"mask_captions": True}),
        variant(UNET | CLASSES | {"patch_size": 1}, process={"kind": "ddpm"}),
        variant(UNET | {"condition": "none"}, process={"kind": "flow"}),
        variant(UNET | {"guidance_input": True}, sampling={"guidance": 3.0}),
    ],
    ids=["text", "class-ddpm", "none-flow", "distilled"],
)
def test_unets_are_plain_and_draw_the_same(config, tmp_path):
    from diffusers import UNet2DConditionModel

    source = trained(tmp_path / "run", config)
    export_diffusers(source, tmp_path / "out")
    assert not list((tmp_path / "out" / "unet").glob("*.py"))
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    network = open_source(tmp_path / "run", None, False).network
    x, time, y = (
        torch.randn(2, plain.config.in_channels, 4, 4),
        torch.tensor([3.0, 40.0]),
        torch.randn(2, 5, 256),
    )
    with torch.no_grad():
        close(network.unet(x, time, y)[0], plain(x, time, y)[0])
    prompts = {"text": ["a red circle", "a blue square"], "class": ["4", "3"], "none": ["", ""]}
    ours, made = both(tmp_path / "run", tmp_path / "out", prompts[config.model.condition])
    close(ours, made)
    assert (tmp_path / "out" / "ddim_scheduler").is_dir() == (config.process.kind == "ddpm")
    if config.model.condition == "class":
        rows = load_file(tmp_path / "out" / "class_table" / "diffusion_pytorch_model.safetensors")["rows"]
        assert rows.shape == (5, 256)
        assert "class_table" in (tmp_path / "out" / "README.md").read_text()


def tiny_autoencoder(folder: Path, **settings) -> Path:
    from diffusers import AutoencoderKL

    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4, **settings,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def latents_of(autoencoder: Path, encoder: str, path: Path | None, **more) -> dict:
    data = {"codec": "autoencoder-kl", "codec_path": str(autoencoder), "text_encoder": encoder, **more}
    return data | ({"text_encoder_path": str(path)} if path is not None else {})


STAGES = tuple({"name": n, "nimg": 500, "batch": 10, "resolution": 32, "lr": 1e-3} for n in ("a", "b"))


@pytest.mark.parametrize("encoder", ["clip", "t5", "minilm"])
def test_autoencoder_and_text_encoder_come_along(encoder, tmp_path, request):
    path = None if encoder == "minilm" else request.getfixturevalue(f"{encoder}_folder")
    settings = {"scaling_factor": 0.3, "shift_factor": 0.1}
    data = latents_of(tiny_autoencoder(tmp_path / "vae", **settings), encoder, path)
    if encoder == "t5":
        data |= {"text_encoder_dtype": "bf16", "codec_dtype": "bf16"}
    base = variant(data=data)
    width = build_text_encoder(base.data).width
    config = variant({"caption_dim": width, "in_channels": 4, "patch_size": 2}, data=data, stages=STAGES)
    source = trained(tmp_path / "run", config)
    export_diffusers(source, tmp_path / "out")
    ours, made = both(tmp_path / "run", tmp_path / "out", ["two cats", "a dog on a roof"], negative="a cat")
    close(ours, made)


def test_what_is_stable_diffusion_all_over_needs_no_code(tmp_path, clip_folder):  # noqa: F811
    from diffusers import StableDiffusionPipeline

    data = latents_of(tiny_autoencoder(tmp_path / "vae", scaling_factor=0.3), "clip", clip_folder)
    width = build_text_encoder(variant(data=data).data).width
    model = UNET | {"in_channels": 4, "caption_dim": width, "patch_size": 1}
    config = variant(
        model, data=data, stages=STAGES, process={"kind": "ddpm", "prediction": "v"}, sampling={"steps": 4}
    )
    source = trained(tmp_path / "run", config)
    said = export_diffusers(source, tmp_path / "out")
    assert "trust_remote_code" not in said
    assert not list((tmp_path / "out").rglob("*.py"))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    own = load_pipeline(tmp_path / "run", torch.device("cpu"))
    noise = initial_noise(0, [0, 1], (4, 4, 4))
    prompts = ["two cats", "a dog on a roof"]
    strong, _ = own._captions(prompts, None)
    ours = sample_latents(own.denoiser, own.process, strong, noise, own.config.sampling)
    embeds = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
    torch.testing.assert_close(embeds, strong.text_BSD)
    # It takes latents as they are, while shoestring scales noise by the first sigma, here 0.998.
    first = own.process.grid(own.config.sampling, 4)[0][1] * noise
    made = pipeline(
        prompt_embeds=embeds, negative_prompt_embeds=torch.zeros_like(embeds), latents=first,
        guidance_scale=2.0, num_inference_steps=4, height=32, width=32, output_type="latent",
    ).images  # fmt: skip
    close(ours, made)


def test_taef2_comes_along(tmp_path, shared):
    data = {"codec": "taef2", "codec_path": str(shared / "data" / "taef2")}
    config = variant({"in_channels": 32, "patch_size": 2}, data=data, stages=STAGES)
    source = trained(tmp_path / "run", config)
    export_diffusers(source, tmp_path / "out")
    close(*both(tmp_path / "run", tmp_path / "out", ["a red circle", "a blue square"]))


# -- without shoestring ------------------------------------------------------------------------------------

ALONE = """
import json, sys
sys.modules["shoestring"] = None  # importing it raises
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
noise = torch.load(sys.argv[2], weights_only=True)
out = pipeline(["a red circle", "a blue square"], latents=noise, output_type="latent").images
torch.save(out, sys.argv[3])
draw = torch.Generator().manual_seed(0)
pictures = pipeline("a red circle", num_images_per_prompt=2, height=16, generator=draw).images
ours = [name for name, module in sys.modules.items() if name.partition(".")[0] == "shoestring" and module]
print([p.size for p in pictures], ours)
"""


@pytest.mark.slow
def test_it_works_where_there_is_no_shoestring(tmp_path):
    source = trained(tmp_path / "run", variant(EXPERTS))
    export_diffusers(source, tmp_path / "out")
    own = load_pipeline(tmp_path / "run", torch.device("cpu"))
    noise = initial_noise(0, [0, 1], (3, 8, 8))
    torch.save(noise, tmp_path / "noise.pt")
    strong, _ = own._captions(["a red circle", "a blue square"], None)
    ours = sample_latents(own.denoiser, own.process, strong, noise, own.config.sampling)
    words = [sys.executable, "-I", "-c", ALONE, tmp_path / "out", tmp_path / "noise.pt", tmp_path / "made.pt"]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[(8, 16), (8, 16)] []" in done.stdout
    close(ours, torch.load(tmp_path / "made.pt", weights_only=True))


def test_without_trust_no_code_of_the_folder_runs(tmp_path):
    from diffusers import DiffusionPipeline

    export_diffusers(trained(tmp_path / "run", variant()), tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(str(tmp_path / "out"))


def test_weights_in_half_precision(tmp_path):
    source = trained(tmp_path / "run", variant())
    export_diffusers(source, tmp_path / "out", "bf16")
    weights = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    ours, made = both(tmp_path / "run", tmp_path / "out", ["a red circle", ""])
    assert 0 < (ours - made).abs().max() < 0.1 * ours.abs().max()  # eight bits of each weight


def test_stored_position_tables_are_kept(tmp_path):
    source = trained(tmp_path / "run", variant(MASKDIT, tokens={"method": "maskdit"}))
    network = source.network
    network.pos_embed, network.decoder_pos_embed = (torch.randn(1, 4, 32) for _ in range(2))
    export_diffusers(source, tmp_path / "out")
    pipeline = loaded(tmp_path / "out")
    x, time, text = torch.randn(2, 3, 8, 8), torch.zeros(2), torch.randn(2, 4, 256)
    mask = torch.ones(2, 4, dtype=torch.bool)
    with torch.no_grad():
        made = pipeline.transformer(x, time, text, mask)[0]
        ours = unpatchify(network(x, time, Conditioning(text, mask)).visible_BKG, (2, 2), 4)
    close(ours, made)


# -- what is refused ---------------------------------------------------------------------------------------


def test_prompts_sides_and_latents_that_do_not_fit(tmp_path):
    source = trained(tmp_path / "run", variant(CLASSES | {"kind": "microdit"}), classes=("cat",))
    export_diffusers(source, tmp_path / "out")
    pipeline = loaded(tmp_path / "out")
    for given, words in (
        ({"prompt": "cow"}, r"the prompt is 'cow'; a class is a number from 0 to 4 or one of cat"),
        ({"prompt": "0", "height": 10}, r"height and width are 10 and 8; they must be multiples of 4"),
        (
            {"prompt": "0", "latents": torch.zeros(2, 3, 8, 8)},
            r"latents have shape .*; \[1, 3, 8, 8\] is",
        ),
        ({"prompt": "0", "sampler": "hoin"}, r"sampler is 'hoin'; choose from heun"),
        ({"prompt": ["0", "1"], "negative_prompt": ["2"]}, r"1 negative prompts are given for 2 pictures"),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline(**given)


def test_guidance_by_tokens_has_no_place_there(tmp_path):
    config = variant(
        {"depth": 4}, tokens={"method": "tread", "first": 1, "last": -1}, sampling={"weak": "tokens"}
    )
    source = trained(tmp_path / "run", config)
    with pytest.raises(UserError, match=r"sampling\.weak is tokens .* export with sampling\.weak=condition"):
        export_diffusers(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    source = trained(tmp_path / "run", variant())
    export_diffusers(source, tmp_path / "out")
    before = sorted(p.name for p in (tmp_path / "out").iterdir())

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    seen = []

    def watched(*_, **__):
        seen.append(sorted(p.name for p in (tmp_path / "out").iterdir()))
        broken()

    monkeypatch.setattr("shoestring.export.pipeline.model_card", watched)
    with pytest.raises(
        UserError, match=r"cannot write .*out \(No space left on device\); nothing was changed"
    ):
        export_diffusers(source, tmp_path / "out")
    assert seen == [before]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before
    with pytest.raises(UserError, match="nothing was changed"):
        export_diffusers(source, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_only_folders_of_ours_are_replaced(tmp_path):
    source = trained(tmp_path / "run", variant())
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(
        UserError, match=r"theirs exists and is no export of shoestring, so it is not replaced"
    ):
        export_diffusers(source, theirs)
    assert [p.name for p in theirs.iterdir()] == ["thesis.txt"]
    export_diffusers(source, tmp_path / "out")
    (tmp_path / "out" / "rest.txt").write_text("of the export before")
    other = replace(source, config=source.config.model_copy(update={"name": "other"}))
    export_diffusers(other, tmp_path / "out")
    assert not (tmp_path / "out" / "rest.txt").exists()
    assert json.loads((tmp_path / "out" / "shoestring.json").read_text())["name"] == "other"


def test_hashed_words_are_the_same_vectors():
    from shoestring.export.remote.pipeline import hashed

    texts = ["A red circle, and apples!", "", "na\u00efve \u732b " * 9]
    for ours, made in zip(HashingText(8)(texts), hashed(texts, 8, 256), strict=True):
        assert torch.equal(ours, made)
