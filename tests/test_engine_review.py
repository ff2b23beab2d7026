"""The engine where it is hurt: roll-backs that are cut off, ranks with unequal shares, signals in between."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from forks import run_ranks
from shoestring.config import GuardConfig, ParallelConfig, RunConfig, TokensConfig, parse_yaml
from shoestring.diffusion.process import EDMProcess, NetworkDenoiser
from shoestring.interfaces import Conditioning
from shoestring.models.files import build_network
from shoestring.runtime import TrainingFailed, Workers, stream
from shoestring.training import beside
from shoestring.training.checkpoint import Checkpoints, Counters, Trained
from shoestring.training.display import read_log, rows_of
from shoestring.training.folder import MACHINE, checkpoint_folders
from shoestring.training.guard import Guard, GuardState
from shoestring.training.loop import Run, train
from shoestring.training.mark import Damaged
from shoestring.training.parallel import Parallel, local
from shoestring.training.saving import Saver
from shoestring.training.schedule import position
from shoestring.training.signals import Signals
from shoestring.training.step import Draws, Learner, TrainingBatch, train_step
from test_checkpoint import FACTS, Small
from test_parallel import BATCH, SHAPE, randomised, recipe

QUIET = Console(quiet=True)
DIVERGES = """
name: diverges
precision: fp32
device: cpu
model: {in_channels: 3, caption_dim: 256, patch_size: 4, dim: 16, depth: 2, head_dim: 8, ffn_multiple_of: 8,
  mixer: {depth: 1, dim: 16}, experts: {count: 0}, mask_captions: true, attention: sdpa}
data: {source: shapes, max_captions: 16, text_encoder: hashing, max_tokens: 8}
stages:
  - {name: calm, nimg: 32, batch: 8, resolution: 24, lr: 0.001}
  - {name: wild, nimg: 96, batch: 8, resolution: 24, lr: 1.0e+18, clip_norm: null}
sampling: {steps: 1, sampler: euler}
guard: {max_skips: 3, window: 16, good_after: 2, lr_cut: 1.0e-30, max_rollbacks: 2}
logging: {log_nimg: 8, validate_nimg: 1000, sample_nimg: 1000, checkpoint_nimg: 1000, validation_images: 4,
  tensorboard: false}
"""


def diverging(**changes: object) -> RunConfig:
    return parse_yaml(DIVERGES).model_copy(update=changes)


def alone() -> Parallel:
    return Parallel(ParallelConfig(), "cpu")


def new(folder: Path) -> Path:
    """A run folder in which the machine was measured already: that takes seconds."""
    folder.mkdir(exist_ok=True)
    (folder / MACHINE).write_text(json.dumps({"matmul_flops_fp32_cpu": 1e9}))
    return folder


def events(folder: Path, what: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("what") == what]


def last(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_folders(folder)[-1] / "weights.safetensors")


class CutOff(Run):
    """Ends as by a kill at the moment it says that it went back."""

    def _go_back(self, by_nimg: dict[int, Path]) -> None:
        super()._go_back(by_nimg)
        raise KeyboardInterrupt


@pytest.mark.parametrize("calm", [True, False])
def test_killed_after_a_roll_back_the_run_ends_as_if_it_had_not_been(tmp_path, calm):
    """It went back to a checkpoint, or to the beginning; either way it does not go the same way again."""
    config = diverging()
    if not calm:
        config = diverging(stages=config.stages[1:])
    assert train(config, new(tmp_path / "whole"), QUIET)
    assert len(events(tmp_path / "whole", "rolled-back")) == 1
    folder = new(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        CutOff(config, folder, QUIET, alone()).train()
    assert [int(each.name) for each in checkpoint_folders(folder)] == [32 if calm else 0]
    assert train(config, folder, QUIET)
    assert len(events(folder, "rolled-back")) == 1
    one, other = last(tmp_path / "whole"), last(folder)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_good_checkpoint_that_is_damaged_is_passed_over_when_going_back(tmp_path):
    class Spoilt(Run):
        def _go_back(self, by_nimg):
            state = next((by_nimg[32] / "state").glob("*.distcp"))
            state.write_bytes(state.read_bytes()[:-1])
            super()._go_back(by_nimg)

    assert Spoilt(diverging(), new(tmp_path), QUIET, alone()).train()
    assert (tmp_path / "checkpoints" / "000000032.damaged").exists()
    assert "the beginning" in events(tmp_path, "rolled-back")[0]["text"]
    assert int(checkpoint_folders(tmp_path)[-1].name) == 128


def test_a_finished_run_with_a_trouble_at_its_end_may_be_asked_again():
    assert Guard(GuardConfig(), GuardState(trouble=64)).bad_since is None


# -- ranks -------------------------------------------------------------------------------------------------


def sharded(folder):
    """Back to the beginning, and validation on shares of 3 and 4 pictures, three at a time."""
    beside.AT_ONCE = 3
    config = diverging()
    often = {"validate_nimg": 8, "validation_images": 7, "kid_nimg": 10**6, "kid_pictures": 6}
    logging = config.logging.model_copy(update=often)
    update = {"stages": config.stages[1:], "logging": logging, "parallel": ParallelConfig(sharding="fsdp")}
    done = train(config.model_copy(update=update), Path(folder), QUIET)
    return {"done": done}


def test_sharded_ranks_go_back_to_the_beginning_and_validate_unequal_shares(tmp_path):
    results = run_ranks(2, "test_engine_review:sharded", str(new(tmp_path)))
    assert [each["done"] for each in results] == [True, True]
    assert len(events(tmp_path, "rolled-back")) == 1
    config = diverging()
    logging = config.logging.model_copy(update={"kid_nimg": 10**6, "kid_pictures": 6})
    update = {"stages": config.stages[1:], "logging": logging}
    assert train(config.model_copy(update=update), new(tmp_path / "one"), QUIET)
    (one,), (two,) = (rows_of(read_log(folder), "evaluation") for folder in (tmp_path / "one", tmp_path))
    assert two["pictures"] == 6
    assert two["kid_efflite0"] == pytest.approx(one["kid_efflite0"], rel=0.05)
    one, two = last(tmp_path / "one"), last(tmp_path)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


@pytest.mark.parametrize(("count", "ranks"), [(129, 2), (64 * 63 * 2 + 1, 2), (5, 3), (2, 3), (128, 2)])
def test_unequal_shares_are_looked_at_in_equally_many_pieces(count, ranks):
    size = beside._equal_pieces(count, ranks)
    shares = [(rank + 1) * count // ranks - rank * count // ranks for rank in range(ranks)]
    assert 1 <= size <= beside.AT_ONCE
    assert len({max(1, -(-share // size)) for share in shares}) == 1


def apart():
    """Of four ranks that hold two copies in halves, one has another bit; and classes in low precision."""
    config = recipe("experts", "adamw")
    parallel = Parallel(ParallelConfig(sharding="hybrid", shard_ranks=2), "cpu")
    learner = Learner.build(
        randomised(config, torch.float32),
        config.tokens,
        EDMProcess(0.5),
        config.optimizer,
        Workers(1),
        parallel,
    )
    trained = Trained(learner.model, learner.optimizers, learner.averages)
    saver = Saver(Checkpoints(Path("unused"), trained, config, parallel), lambda *_: None)
    saver._check_ranks_agree(0)
    if parallel.rank == 3:
        with torch.no_grad():
            local(next(learner.model.parameters())).view(-1)[0] += 1e-3
    said = ""
    try:
        saver._check_ranks_agree(0)
    except TrainingFailed as error:
        said = str(error)
    config = recipe("maskdit", "adamw")
    network = randomised(config, torch.float32)
    process = EDMProcess(0.5)
    learner = Learner.build(
        network, config.tokens, process, config.optimizer, Workers(1), parallel, torch.bfloat16
    )
    seen = []
    network.y_embedder.register_forward_hook(lambda module, _, out: seen.append(str(out.dtype)))
    here = position(config, 0)
    draws = Draws.make(0, "train", 0, 3, SHAPE, 16)
    condition = Conditioning(class_B=torch.tensor([0, 1, 1]))
    batch = TrainingBatch(draws.posterior, condition, draws.noise, draws.level_B, draws.mask_BL)
    train_step(learner, batch, 3, 1e-3, 0.5, here)
    assert isinstance(network.y_embedder, FSDPModule)
    return {"said": said, "copies": parallel.copies, "dtypes": seen}


def test_copies_of_a_part_are_compared_and_class_tables_stay_float32():
    for each in run_ranks(4, "test_engine_review:apart"):
        assert each["copies"] == [[0, 2], [1, 3]]
        assert "no longer hold the same weights" in each["said"]
        assert "rank 1" in each["said"] or "rank 3" in each["said"]
        assert "rank 0" not in each["said"]
        assert each["dtypes"] == ["torch.float32"]


# -- signals, threads, devices -----------------------------------------------------------------------------


class Interrupted(Parallel):
    """A SIGTERM comes while the ranks agree on what they were asked before."""

    def largest(self, value: int) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().largest(value)


def test_a_stop_that_comes_while_a_save_is_agreed_on_is_not_lost():
    with Signals(Interrupted(ParallelConfig(), "cpu"), QUIET, lambda: 0.0) as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        asked = signals.agreed()
        assert (asked.save, asked.stop) == (True, False)
        assert signals.agreed().stop


def test_model_files_hold_float32_though_a_step_computes_with_copies(tmp_path):
    """The thread that writes runs while the network holds bf16 copies of its weights."""
    config = recipe("experts", "adamw")
    learner = Learner.build(
        randomised(config, torch.float32),
        config.tokens,
        EDMProcess(0.5),
        config.optimizer,
        Workers(2),
        precision=torch.bfloat16,
    )
    trained = Trained(learner.model, learner.optimizers, learner.averages)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    checkpoints = Checkpoints(tmp_path, trained, config, learner.parallel)
    checkpoints.save(Counters(nimg=BATCH), FACTS)
    assert learner.low_precision is not None
    with learner.low_precision.used():
        checkpoints.wait()
    written = load_file(checkpoint_folders(tmp_path)[-1] / "weights.safetensors")
    assert {value.dtype for value in written.values()} == {torch.float32}
    assert all(torch.equal(written[name], value) for name, value in before.items())
    learner.workers.close()


def test_a_resumed_run_has_as_many_threads_as_it_began_with(tmp_path):
    config, threads = diverging(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first = Run(config, new(tmp_path), QUIET, alone())
        torch.set_num_threads(1)
        again = Run(config, tmp_path, QUIET, alone())
        assert torch.get_num_threads() == 2
        assert again.learner.workers.count == 2
        assert json.loads((tmp_path / MACHINE).read_text())["workers_cpu"] == 2
        first.learner.workers.close()
        again.learner.workers.close()
    finally:
        torch.set_num_threads(threads)


def test_a_rank_that_cannot_read_keeps_the_others_from_waiting(tmp_path):
    """On one rank at least: what cannot be read is a damaged checkpoint, whatever torch calls it."""
    small = Small(tmp_path)
    small.save()
    small.checkpoints.wait()
    with pytest.raises(Damaged, match="is damaged"):
        small.checkpoints._all_can(lambda: Path("nowhere").read_bytes(), Path(small.place()))


class Plain(NetworkDenoiser):
    """The meta device knows no autocast, not even one that is off."""

    def _autocast(self, device):
        return nullcontext()


@pytest.mark.parametrize(
    ("kind", "tokens", "ratio"),
    [
        ("experts", TokensConfig(), 0.5),
        ("experts", TokensConfig(method="sprint", first=1, last=2, path_drop=0.1), 0.5),
        ("maskdit", None, 0.5),
        ("maskdit", None, 0.0),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_nothing_in_a_step_waits_for_the_device(kind, tokens, ratio, optimizer):
    """On the meta device there are no values: whatever the host asked for would be an error."""
    config = recipe(kind, optimizer)
    tokens = tokens or config.tokens
    config = config.model_copy(update={"tokens": tokens})
    network = build_network(config, stream(0, "init")).to("meta")
    parallel = alone()
    parallel.device = torch.device("meta")
    learner = Learner.build(network, tokens, EDMProcess(0.5), config.optimizer, Workers(1), parallel)
    draws = Draws.make(0, "train", 0, 4, SHAPE, 16)
    if config.model.condition == "text":
        condition = Conditioning(torch.zeros(4, 5, 8, device="meta"))
    else:
        condition = Conditioning(class_B=torch.zeros(4, dtype=torch.long, device="meta"))
    paths = torch.zeros(4, dtype=torch.bool, device="meta") if tokens.method == "sprint" else None
    moved = (t.to("meta") for t in (draws.noise, draws.level_B, draws.mask_BL))
    dropped = condition.drop(torch.zeros(4, dtype=torch.bool, device="meta"))
    batch = TrainingBatch(draws.posterior.to("meta"), dropped, *moved, paths)
    learner.training_denoiser = Plain(learner.process, network, torch.float32)
    result = train_step(learner, batch, 2, 1e-3, ratio, position(config, 0))
    assert result.loss.device.type == "meta"
