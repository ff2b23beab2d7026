"""The four MicroDiT stages as one tiny run: what changes at a boundary, resumed in each, begun at any."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from shoestring import recipes
from shoestring.config import RunConfig, StageConfig, StoreConfig, parse_yaml, to_yaml
from shoestring.data.ingest import ingest
from shoestring.data.precompute import Job, LatentsJob, TextJob, prepare
from shoestring.data.readers import open_reader
from shoestring.data.store_rows import StoreData
from shoestring.data.units import Makers
from shoestring.diffusion.process import build_process
from shoestring.encoders.image import PixelCodec
from shoestring.encoders.text import HashingText
from shoestring.evaluation.validation import validation_loss
from shoestring.models.files import build_network, load_model, read_header
from shoestring.models.layers import sincos_positions
from shoestring.models.released import to_released
from shoestring.runtime import UserError, stream
from shoestring.training.folder import check_same_run
from shoestring.training.loop import Run, train
from shoestring.training.parallel import Parallel
from shoestring.training.stage_data import check_settings, load_stage
from shoestring.training.starting import from_stage, initial_weights
from shoestring.training.stores import check_stages, open_stores

QUIET = Console(quiet=True)
BASE = """
name: four
seed: 3
power_ema: [0.1]
precision: fp32
device: cpu
model:
  in_channels: 3
  caption_dim: 256
  patch_size: 4
  dim: 16
  depth: 2
  head_dim: 8
  ffn_multiple_of: 8
  mixer: {depth: 1, dim: 24}
  experts: {count: 2}
  mask_captions: true
  attention: sdpa
data: {source: store, text_encoder: hashing, max_tokens: 8, held_out: 0.2, split: pictures}
stages: [{name: replaced, nimg: 1, lr: 1}]
sampling: {steps: 1}
logging: {log_nimg: 4, validate_nimg: 1000, sample_nimg: 1000, checkpoint_nimg: 8, keep_checkpoints: 20,
  validation_images: 4, tensorboard: false}
"""
STARTS = {"pretrain-256": 0, "finetune-256": 16, "pretrain-512": 32, "finetune-512": 48}
END = 64


def tiny_stages(real: str) -> tuple[StageConfig, ...]:
    """The stages of the recipe at a sixteenth of the resolution, four steps or two each."""
    stages = []
    for i, stage in enumerate(recipes.get("microdit-xl2").stages):
        large = stage.resolution == 512
        changes = {
            "nimg": 16,
            "batch": (4, 8, 4, 8)[i],
            "micro_batch": None,
            "resolution": stage.resolution // 16,
            "lr": 20 * stage.lr,
            "warmup_nimg": 8 if stage.warmup_nimg else 0,
            "ema_start_nimg": 8 if stage.ema_start_nimg else 0,
            "min_side": None if stage.min_side is None else stage.min_side // 16,
            "stores": (StoreConfig(path=real),) if large else (),
        }
        stages.append(StageConfig.model_validate(stage.model_dump() | changes))
    return tuple(stages)


def pictures(folder: Path, count: int, seed: int) -> Path:
    """Pictures with captions, every fourth of them small."""
    folder.mkdir()
    for i in range(count):
        side = 24 if i % 4 == 0 else 40
        pixels = np.random.RandomState(seed + i).randint(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"number {i % 5}")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores at both resolutions: ``real``, for all stages, and ``painted``, for the first two."""
    folder = tmp_path_factory.mktemp("stages")
    job = Job(
        latents=tuple(LatentsJob(str(side), side, ((side, side),)) for side in (16, 32)),
        text=(TextJob("text"),),
        batch=8,
    )
    for name, count, seed in (("real", 40, 0), ("painted", 24, 1000)):
        source = pictures(folder / f"{name}-pictures", count, seed)
        raw = ingest(open_reader(f"folder:{source}"), str(folder / f"{name}-raw"))
        prepare(raw, str(folder / name), job, Makers(PixelCodec, {"text": lambda: HashingText(8)}))
    return folder


@pytest.fixture(scope="module")
def config(place: Path) -> RunConfig:
    base = parse_yaml(BASE)
    both = (StoreConfig(path=str(place / "real")), StoreConfig(path=str(place / "painted")))
    data = base.data.model_copy(update={"stores": both})
    return base.model_copy(update={"data": data, "stages": tiny_stages(str(place / "real"))})


def run_folder(place: Path, name: str) -> Path:
    """A run folder that need not measure the machine: that takes seconds."""
    folder = place / name
    folder.mkdir()
    (folder / "machine.json").write_text(json.dumps({"matmul_flops_fp32_cpu": 1e9}))
    return folder


class Watched(Run):
    """Notes before each step what the stage is made of; stops after some steps, or is as if killed."""

    def __init__(
        self, config: RunConfig, folder: Path, stop: int | None = None, killed: bool = False
    ) -> None:
        super().__init__(config, folder, QUIET, Parallel(config.parallel, config.device))
        self.stop, self.killed = stop, killed
        self.seen: dict[int, dict[str, Any]] = {}

    def _step(self, *words: Any) -> bool:
        train, model = self.data.train, self.learner.model
        assert isinstance(train, StoreData)
        self.seen[self.counters.nimg] = {
            "stage": words[0].stage.name,
            "stores": [Path(member.store.uri).name for member in train.members],
            "pictures": len(train),
            "resolution": self.data.resolution,
            "scale": model.position_scale,
            "optimizer": any(bool(tensor.any()) for tensor in self.learner.optimizers.tensors().values()),
            "row": self.data.batch(words[0].stage, words[0].start_nimg, self.counters.nimg).x0.sum().item(),
        }
        goes_on = super()._step(*words)
        if self.counters.nimg == self.stop:
            if self.killed:
                raise InterruptedError
            signal.raise_signal(signal.SIGTERM)
        return goes_on


def files(folder: Path, nimg: int) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and averages of a checkpoint."""
    checkpoint = folder / "checkpoints" / f"{nimg:09d}"
    return {name: load_file(checkpoint / f"{name}.safetensors") for name in ("weights", "ema", "power-0.1")}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(place: Path, config: RunConfig) -> tuple[Path, dict[int, dict[str, Any]]]:
    """The undisturbed run and what it was made of at each step."""
    folder = run_folder(place, "whole")
    (folder / "config.yaml").write_text(to_yaml(config))
    run = Watched(config, folder)
    assert run.train()
    return folder, run.seen


def test_everything_changes_where_a_stage_begins(whole: tuple[Path, dict[int, dict[str, Any]]]) -> None:
    _, seen = whole
    assert {row["stage"]: nimg for nimg, row in reversed(seen.items())} == STARTS
    assert len(seen) == 4 + 2 + 4 + 2
    by_stage = {row["stage"]: row for row in seen.values()}
    first, second, third, fourth = (by_stage[name] for name in STARTS)
    assert (first["resolution"], first["scale"]) == (second["resolution"], second["scale"]) == (16, 1.0)
    assert (third["resolution"], third["scale"]) == (fourth["resolution"], fourth["scale"]) == (32, 2.0)
    assert first["stores"] == second["stores"] == ["real", "painted"]
    assert third["stores"] == fourth["stores"] == ["real"]
    # Of 40 pictures 30 are large, of which about a fifth is held out; of the 24 others none.
    assert 15 <= third["pictures"] < 30 < first["pictures"] <= 64
    assert {nimg: row["optimizer"] for nimg, row in seen.items() if nimg in STARTS.values()} == {
        0: False,
        16: True,
        32: False,
        48: True,
    }


def test_the_average_starts_where_a_stage_says(whole: tuple[Path, dict[int, dict[str, Any]]]) -> None:
    folder, _ = whole
    there = {nimg: files(folder, nimg) for nimg in (16, 32, 40, 48, 56, END)}
    averaged = {nimg: not equal(each["weights"], each["ema"]) for nimg, each in there.items()}
    assert averaged == {16: False, 32: False, 40: False, 48: True, 56: False, END: True}


def test_model_files_know_their_stage(
    whole: tuple[Path, dict[int, dict[str, Any]]], config: RunConfig
) -> None:
    folder, _ = whole
    for nimg, scale, resolution in ((32, 1.0, 16), (40, 2.0, 32), (END, 2.0, 32)):
        read, network, facts = load_model(folder / "checkpoints" / f"{nimg:09d}" / "ema.safetensors")
        assert read == config
        assert (facts.position_scale, facts.resolution) == (scale, resolution)
        grid = (resolution // 4,) * 2
        table_LD = network.positions(grid, torch.zeros(1, 16))
        assert torch.equal(table_LD, sincos_positions(16, grid, scale))
    assert not torch.equal(sincos_positions(16, (8, 8), 1.0), sincos_positions(16, (8, 8), 2.0))


@pytest.mark.parametrize("name", ["pretrain-256", "pretrain-512"])
def test_masked_stages_are_validated_on_all_patches(
    whole: tuple[Path, dict[int, dict[str, Any]]], config: RunConfig, name: str
) -> None:
    folder, _ = whole
    stage = next(stage for stage in config.stages if stage.name == name)
    assert stage.mask_ratio == 0.75
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    (logged,) = [row for row in rows if row["kind"] == "validation" and row["stage"] == name]
    _, network, facts = load_model(folder / "checkpoints" / f"{logged['nimg']:09d}" / "ema.safetensors")
    process = build_process(config.process, facts.sigma_data)
    text_encoder = HashingText(8)
    data = load_stage(config, stage, PixelCodec(), text_encoder, torch.device("cpu"), folder, QUIET)
    x0, conditioning, held_out = data.held_out_batch(config.logging.validation_images)
    losses = validation_loss(process, process.denoiser(network), x0, conditioning)
    assert held_out
    assert logged["loss_per_level"] == pytest.approx({f"{k:g}": v for k, v in losses.items()}, rel=1e-4)


def test_interrupted_in_every_stage_the_run_ends_with_the_same_bits(
    place: Path, config: RunConfig, whole: tuple[Path, dict[int, dict[str, Any]]]
) -> None:
    folder, seen = whole
    pieces = run_folder(place, "pieces")
    noted: dict[int, dict[str, Any]] = {}
    for stop, killed in ((8, False), (24, True), (32, False), (44, True), (56, False), (None, False)):
        run = Watched(config, pieces, stop, killed)
        if killed:
            with pytest.raises(InterruptedError):
                run.train()
        else:
            assert run.train() == (stop is None)
        assert all(noted.get(nimg, row) == row for nimg, row in run.seen.items())  # steps that are repeated
        noted |= run.seen
    assert noted == seen
    for name, tensors in files(folder, END).items():
        assert equal(tensors, files(pieces, END)[name])


# -- beginning at any stage --------------------------------------------------------------------------------


def drawn(config: RunConfig) -> Any:
    """A network without zeros, so that weights that were not taken over show."""
    network = build_network(config, stream(7, "init"))
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=stream(8, "noise", i))
    network.position_scale = 2.0
    return network


def released_pt(place: Path, config: RunConfig) -> tuple[Path, dict[str, torch.Tensor]]:
    network, path = drawn(config), place / "released.pt"
    torch.save({f"dit.{name}": t for name, t in to_released(network, side=8).items()}, path)
    return path, {name: p.detach() for name, p in network.named_parameters()}


def released_safetensors(place: Path, config: RunConfig) -> tuple[Path, dict[str, torch.Tensor]]:
    network, path = drawn(config), place / "released.safetensors"
    save_file({name: t.contiguous() for name, t in to_released(network, side=8).items()}, path)
    return path, {name: p.detach() for name, p in network.named_parameters()}


def own_run(place: Path, config: RunConfig) -> tuple[Path, dict[str, torch.Tensor]]:
    return place / "whole", files(place / "whole", END)["ema"]


def own_checkpoint(place: Path, config: RunConfig) -> tuple[Path, dict[str, torch.Tensor]]:
    return place / "whole" / "checkpoints" / "000000032", files(place / "whole", 32)["ema"]


def own_file(place: Path, config: RunConfig) -> tuple[Path, dict[str, torch.Tensor]]:
    return place / "whole/checkpoints/000000048/weights.safetensors", files(place / "whole", 48)["weights"]


@pytest.mark.parametrize("make", [released_pt, released_safetensors, own_run, own_checkpoint, own_file])
def test_a_run_begins_with_weights_of_any_kind(
    place: Path,
    config: RunConfig,
    whole: tuple[Path, dict[int, dict[str, Any]]],
    make: Callable[[Path, RunConfig], tuple[Path, dict[str, torch.Tensor]]],
) -> None:
    path, tensors = make(place, config)
    begins = config.model_copy(update={"initial_weights": str(path)})
    network = build_network(begins, stream(0, "init"))
    initial_weights(begins, network)
    assert equal({name: p.detach() for name, p in network.named_parameters()}, tensors)
    assert network.pos_embed is None  # the stage decides


def test_a_run_begun_at_the_third_stage(
    place: Path, config: RunConfig, whole: tuple[Path, dict[int, dict[str, Any]]]
) -> None:
    """Scaled as the weights were trained; once it has begun, it does not need the file that it began with."""
    source = place / "start.safetensors"
    shutil.copy(place / "whole/checkpoints/000000032/weights.safetensors", source)
    later = from_stage(config.model_copy(update={"initial_weights": str(source)}), "pretrain-512")
    assert later == from_stage(config.model_copy(update={"initial_weights": str(source)}), "2")
    assert [stage.name for stage in later.stages] == ["pretrain-512", "finetune-512"]
    folder = run_folder(place, "later")
    run = Watched(later, folder, stop=8)
    begun = read_header(source, None)
    assert run.sigma_data == begun.facts.sigma_data != run.data.train.sigma_data()
    named = dict(run.learner.model.named_parameters())
    assert equal({name: p.detach() for name, p in named.items()}, begun.tensors)
    assert all(equal(run.learner.averages.named(t), begun.tensors) for t in run.learner.averages.tracks)
    assert not run.train()
    assert run.seen[0]["scale"] == 2.0
    assert not run.seen[0]["optimizer"]
    source.unlink()
    run = Watched(later, folder)
    assert run.sigma_data == begun.facts.sigma_data
    assert run.train()
    assert sorted(run.seen) == [8, 12, 16, 24]
    # The same as the third stage of the whole run, but for its numbers of images: other pictures and noise.
    assert not equal(files(folder, 32)["weights"], files(place / "whole", END)["weights"])


def test_starting_weights_may_move_but_stores_of_a_stage_may_not_change(
    place: Path, config: RunConfig, whole: tuple[Path, dict[int, dict[str, Any]]]
) -> None:
    folder, _ = whole
    assert check_same_run(folder, config.model_copy(update={"initial_weights": "elsewhere"})) == []

    def with_stores(*paths: str) -> RunConfig:
        stores = tuple(StoreConfig(path=path) for path in paths)
        stages = (*config.stages[:3], config.stages[3].model_copy(update={"stores": stores}))
        return config.model_copy(update={"stages": stages})

    assert check_same_run(folder, with_stores("moved")) == []
    for paths in ((), ("one", "two")):
        with pytest.raises(UserError, match=r"stages\.3\.stores"):
            check_same_run(folder, with_stores(*paths), allow_changes=True)


# -- mistakes ----------------------------------------------------------------------------------------------


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_weights_are_sentences(
    tmp_path: Path, place: Path, config: RunConfig, whole: tuple[Path, dict[int, dict[str, Any]]]
) -> None:
    folder, _ = whole
    own = folder / "checkpoints/000000064/weights.safetensors"
    released, _ = released_pt(tmp_path, config)
    pickled = tmp_path / "code.pt"
    torch.save({"model": Console}, pickled)
    for name, original in (("own.safetensors", own), ("cut.pt", released)):
        (tmp_path / name).write_bytes(original.read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")

    def said(path: Path, **model: Any) -> str:
        changed = config.model_validate(config.model_dump() | {"initial_weights": str(path)})
        changed = changed.model_copy(update={"model": changed.model.model_copy(update=model)})
        network = build_network(changed, stream(0, "init"))
        before = [p.detach().clone() for p in network.parameters()]
        sentence = refusal(lambda: initial_weights(changed, network))
        assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))
        return sentence

    assert "nowhere does not exist" in said(tmp_path / "nowhere")
    assert "empty holds no checkpoint" in said(tmp_path / "empty")
    assert "own.safetensors is damaged" in said(tmp_path / "own.safetensors")
    assert "cut.pt is damaged" in said(tmp_path / "cut.pt")
    assert "code.pt holds Python objects other than tensors" in said(pickled)
    assert "foreign.safetensors: key 'a' is unexpected" in said(tmp_path / "foreign.safetensors")
    assert "it is a checkpoint of another model" in said(own, depth=1)
    assert "pos_embed has shape [1, 64, 16]; it must be [1, side * side, 32]" in said(released, dim=32)
    assert "it is a checkpoint of another model" in said(released, depth=3)
    assert "is of another model, with model.head_dim=8, here it is 16" in said(own, head_dim=16)


def test_a_scale_that_does_not_fit_the_weights_is_a_sentence(
    tmp_path: Path, config: RunConfig, whole: tuple[Path, dict[int, dict[str, Any]]]
) -> None:
    folder, _ = whole
    process = config.process.model_copy(update={"sigma_data": 0.4})
    wrong = config.model_copy(update={"process": process, "initial_weights": str(folder)})
    (tmp_path / "machine.json").write_text(json.dumps({"matmul_flops_fp32_cpu": 1e9}))
    assert "process.sigma_data is 0.4, but" in refusal(lambda: train(wrong, tmp_path, QUIET))
    released, _ = released_pt(tmp_path, config)
    unknown = config.model_copy(update={"initial_weights": str(released)})
    sentence = refusal(lambda: train(unknown, tmp_path, QUIET))
    assert "released.pt does not say what it was trained with; set it (released MicroDiT: 0.9" in sentence


def test_wrong_first_stages_are_sentences(tmp_path: Path, mistake: Callable[..., str]) -> None:
    assert "there is no stage 'tune'; choose from 0 (pretrain-256), 1" in mistake(
        "train", "microdit-xl2", "--from-stage", "tune", "--out", tmp_path
    )
    assert "there is no stage '4'" in mistake("train", "microdit-xl2", "--from-stage", 4, "--out", tmp_path)
    assert "initial_weights is not set" in mistake(
        "train", "microdit-xl2", "--from-stage", "pretrain-512", "--out", tmp_path
    )
    assert "nowhere does not exist" in mistake(
        "train", "demo-shapes", "initial_weights=nowhere", "--from-stage", 0, "--out", tmp_path
    )


def test_wrong_subsets_are_sentences(tmp_path: Path, place: Path, config: RunConfig) -> None:
    codec, encoder = PixelCodec(), HashingText(8)

    def third(source: str = "store", **changes: Any) -> RunConfig:
        stage = StageConfig.model_validate(config.stages[2].model_dump() | changes)
        data = config.data.model_copy(update={"source": source})
        stages = (*config.stages[:2], stage)
        return config.model_copy(update={"data": data, "stages": stages})

    def stores(**changes: Any) -> str:
        wrong = third(**changes)
        return refusal(lambda: check_stages(wrong, codec, encoder, tmp_path, QUIET))

    real = {"path": str(place / "real")}
    name = "stages.pretrain-512"
    assert f"{name}.stores.0.weight is 0, but" in stores(stores=[real | {"weight": 0}])
    assert f"{name}.stores.1.path is" in stores(stores=[real, real])
    assert "nowhere" in stores(stores=[{"path": str(place / "nowhere")}])
    sentence = stores(min_side=41)
    assert "stage 'pretrain-512' has min_side 41, which leaves no picture of" in sentence
    assert "a shorter side of 40 px" in sentence
    assert f"{name}.stores is set, but data.source is shapes" in refusal(
        lambda: check_settings(third("shapes"), codec, encoder)
    )
    assert f"{name}.min_side is 32, but" in refusal(
        lambda: check_settings(third("shapes", stores=[]), codec, encoder)
    )


def test_a_stage_without_some_class_is_a_sentence(tmp_path: Path, place: Path, config: RunConfig) -> None:
    """Classes are numbered by the alphabet: with one less the others would move up."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, (side, word) in enumerate([(40, "ant"), (24, "bee"), (40, "cat")] * 8):
        Image.new("RGB", (side, side), (10 * i, 0, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(word)
    raw = ingest(open_reader(f"folder:{folder}"), str(tmp_path / "raw"))
    job = Job(latents=(LatentsJob("16", 16, ((16, 16),)),), text=(), batch=8)
    prepare(raw, str(tmp_path / "animals"), job, Makers(PixelCodec, {}))
    model = config.model.model_copy(update={"condition": "class", "classes": 3})
    data = config.data.model_copy(update={"stores": (), "path": str(tmp_path / "animals")})
    stages = [
        StageConfig(name=name, nimg=8, batch=4, resolution=16, lr=1e-3, min_side=side)
        for name, side in (("all", None), ("large", 32))
    ]
    wrong = config.model_copy(update={"model": model, "data": data, "stages": tuple(stages)})
    sentence = refusal(lambda: check_stages(wrong, PixelCodec(), None, tmp_path, QUIET))
    assert "stage 'large' does not have the class 'bee'" in sentence
    train_rows, _ = open_stores(wrong, stages[1], PixelCodec(), None, tmp_path, QUIET)
    assert train_rows.captions == ("ant", "cat")
