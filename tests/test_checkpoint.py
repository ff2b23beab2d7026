"""Checkpoints: other numbers of ranks, writes beside the steps, kills, damage, and what is kept."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
import torch

from forks import FORKS, run_ranks
from shoestring.config import LoggingConfig, ParallelConfig
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning
from shoestring.models.files import load_model
from shoestring.runtime import Workers, stream
from shoestring.training.checkpoint import Checkpoints, Counters, Trained
from shoestring.training.folder import checkpoint_folders
from shoestring.training.parallel import Parallel, whole
from shoestring.training.saving import Saver, milestones_of
from shoestring.training.schedule import position
from shoestring.training.step import Draws, Learner, TrainingBatch, train_step
from test_parallel import BATCH, SHAPE, randomised, recipe

FACTS = {"sigma_data": 0.5, "position_scale": 1.0, "resolution": 32, "classes": ()}
STEPS = 3


class Small:
    """A training without a run around it: steps on drawn pictures, and its checkpoints."""

    def __init__(self, folder, sharding="auto", optimizer="adamw", keep=9, lengths=(0.1,), workers=1, dim=32):
        config = recipe("experts", optimizer)
        model = config.model.model_copy(update={"dim": dim})
        update = {"logging": LoggingConfig(keep_checkpoints=keep), "power_ema": lengths, "model": model}
        self.config = config.model_copy(update=update)
        self.parallel = Parallel(ParallelConfig(sharding=sharding), "cpu")
        self.learner = Learner.build(
            randomised(self.config, torch.float32),
            config.tokens,
            EDMProcess(0.5),
            config.optimizer,
            Workers(workers),
            self.parallel,
            power_ema=lengths,
        )
        self.trained = Trained(self.learner.model, self.learner.optimizers, self.learner.averages)
        self.checkpoints = Checkpoints(Path(folder), self.trained, self.config, self.parallel)
        self.counters = Counters()

    def train(self, steps):
        losses = []
        ranks, rank = self.parallel.ranks, self.parallel.rank
        first, count = rank * BATCH // ranks, BATCH // ranks
        for _ in range(steps):
            here = position(self.config, self.counters.nimg)
            draws = Draws.make(0, "train", self.counters.nimg + first, count, SHAPE, 16)
            text = torch.stack([torch.randn(5, 8, generator=stream(2, "text", i)) for i in range(BATCH)])
            batch = TrainingBatch(
                draws.posterior,
                Conditioning(text[first : first + count]),
                draws.noise,
                draws.level_B,
                draws.mask_BL,
            )
            result = train_step(self.learner, batch, count, 1e-3, here.stage.mask_ratio, here)
            self.counters.nimg += BATCH
            losses.append(result.loss.item())
        return losses

    def save(self, **options):
        self.checkpoints.save(self.counters, FACTS, **options)

    def restore(self, folder):
        self.counters, _ = self.checkpoints.restore(Path(folder))

    def digests(self):
        """Of every tensor of the state as a whole, however it is shared out."""
        return {
            name: hashlib.sha256(whole(tensor).numpy().tobytes()).hexdigest()
            for name, tensor in self.trained.tensors().items()
        }

    def place(self):
        return str(self.checkpoints.run / "checkpoints" / f"{self.counters.nimg:09d}")


# -- other numbers of ranks --------------------------------------------------------------------------------

KINDS = [("ddp", "muon"), ("fsdp", "adamw")]


def legs(folder, before):
    """For each kind: an undisturbed training with a save half way, the same resumed, and foreign ones."""
    found = {}
    for sharding, optimizer in KINDS:
        name = f"{sharding} {optimizer}"
        small = Small(f"{folder}/{name}", sharding, optimizer)
        small.train(STEPS)
        small.save()
        saved, place, said = small.digests(), small.place(), {}
        said |= {"saved": saved, "place": place, "losses": small.train(STEPS), "end": small.digests()}
        small.checkpoints.wait()
        again = Small(f"{folder}/{name}", sharding, optimizer)
        again.restore(place)
        said |= {"restored": again.digests(), "again": again.train(STEPS), "again end": again.digests()}
        for label, places in before.items():
            small = Small(f"{folder}/{name}", sharding, optimizer)
            small.restore(places[name])
            said |= {label: small.digests(), f"{label} losses": small.train(STEPS)}
        found[name] = said
    return found


def places(said):
    return {kind: of["place"] for kind, of in said.items()}


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """On two ranks, from there on one, from both on three, and from three back on one."""
    folder = str(tmp_path_factory.mktemp("journey"))
    two = run_ranks(2, "test_checkpoint:legs", f"{folder}/two", {})
    one = legs(f"{folder}/one", {"two": places(two[0])})
    before = {"two": places(two[0]), "one": places(one)}
    three = run_ranks(3, "test_checkpoint:legs", f"{folder}/three", before)
    back = legs(f"{folder}/back", {"three": places(three[0])})
    return {"two": two, "one": [one], "three": three, "back": [back]}


@pytest.mark.parametrize("kind", [" ".join(kind) for kind in KINDS])
def test_the_same_ranks_go_on_bit_for_bit(journey, kind):
    for ranks in ("two", "one", "three"):
        for each in (rank[kind] for rank in journey[ranks]):
            assert each["restored"] == each["saved"]
            assert each["end"] != each["saved"]
            assert each["again"] == each["losses"]
            assert each["again end"] == each["end"], ranks


@pytest.mark.parametrize("kind", [" ".join(kind) for kind in KINDS])
def test_other_ranks_go_on_where_the_others_were(journey, kind):
    """The state is the same to the last bit, and the losses that follow are those of the others."""
    moves = [("two", "one"), ("two", "three"), ("one", "three"), ("three", "back")]
    near = 1e-4 if "adamw" in kind else 1e-3  # Newton-Schulz runs in bf16
    for source, target in moves:
        saved = journey[source][0][kind]
        for each in (rank[kind] for rank in journey[target]):
            assert each[source] == saved["saved"], (source, target)
            assert each[f"{source} losses"] == pytest.approx(saved["losses"], rel=near)
            assert any(a != b for a, b in zip(saved["losses"][1:], saved["losses"][:-1], strict=True))


def test_the_model_file_holds_what_the_ranks_held_together(journey):
    for kind in ("ddp muon", "fsdp adamw"):
        said = journey["three"][0][kind]
        prefixes = {"weights": "weights.", "ema": "averages.ema.", "power-0.1": "averages.power-0.1."}
        for name, prefix in prefixes.items():
            _, network, facts = load_model(Path(said["place"]) / f"{name}.safetensors")
            assert facts.nimg == STEPS * BATCH
            for key, value in network.named_parameters():
                digest = hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
                assert digest == said["saved"][prefix + key], key


# -- writing beside the steps ------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    return Small(tmp_path)


def test_weights_that_change_during_the_write_do_not_reach_the_file(tmp_path):
    """80 MB are on their way for a while; meanwhile all tensors are changed in place, as by a step."""
    small = Small(tmp_path, dim=384)
    before = {name: tensor.clone() for name, tensor in small.trained.tensors().items()}
    small.save()
    for tensor in small.trained.tensors().values():
        tensor.fill_(7.0)
    assert not Path(small.place()).exists()  # it was not written yet when they changed
    small.checkpoints.wait()
    small.restore(small.place())
    for name, tensor in small.trained.tensors().items():
        assert torch.equal(tensor, before[name]), name
    _, network, _ = load_model(Path(small.place()) / "ema.safetensors")
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[f"averages.ema.{name}"])


def test_a_save_begun_while_one_is_on_its_way_waits_for_it(small):
    small.save()
    first = Path(small.place())
    small.counters.nimg += BATCH
    small.save()
    assert (first / "complete.json").exists()
    small.checkpoints.wait()
    assert len(checkpoint_folders(small.checkpoints.run)) == 2


def save_for_ever(folder):
    """All tensors are the number of images; checkpoint after checkpoint, until somebody ends it."""
    small = Small(folder, keep=2)
    while True:
        small.counters.nimg += 1
        for tensor in small.trained.tensors().values():
            tensor.fill_(small.counters.nimg)
        small.save()


def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path):
    """In the middle of copying, writing, hashing, renaming and deleting."""
    delays = torch.rand(8, generator=stream(0, "kill")).tolist()
    small, leftovers = Small(tmp_path), 0
    for delay_s in delays:
        known = len(checkpoint_folders(tmp_path))
        process = FORKS.Process(target=save_for_ever, args=(str(tmp_path),))
        process.start()
        deadline = time.monotonic() + 60
        while len(checkpoint_folders(tmp_path)) <= known and time.monotonic() < deadline and known < 2:
            time.sleep(0.01)
        time.sleep(delay_s / 4)
        process.kill()
        process.join()
        newest = checkpoint_folders(tmp_path)[-1]
        leftovers += len(list((tmp_path / "checkpoints").glob(".*")))
        small.checkpoints.tidy()
        assert not list((tmp_path / "checkpoints").glob(".*"))
        small.restore(newest)
        values = {tensor.unique().tolist()[0] for tensor in small.trained.tensors().values()}
        assert values == {float(newest.name)} == {float(small.counters.nimg)}
    assert leftovers > 0  # some of them were caught in the middle


# -- what is kept ------------------------------------------------------------------------------------------


def files(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_the_last_ones_milestones_and_averages_of_deleted_ones_stay(tmp_path):
    small = Small(tmp_path, keep=2, lengths=(0.05, 0.1))
    weights, name = {}, small.learner.averages.names[0]
    for k in range(6):
        weights[small.counters.nimg] = small.learner.averages.named("power-0.05")[name].clone()
        small.save(keep_forever=k == 1)
        small.train(1)
    small.checkpoints.wait()
    assert [int(f.name) for f in checkpoint_folders(tmp_path)] == [12, 48, 60]
    gone = [0, 24, 36]
    assert sorted(int(f.name) for f in (tmp_path / "snapshots").iterdir()) == gone
    for nimg in gone:
        kept = tmp_path / "snapshots" / f"{nimg:09d}"
        assert {file.name for file in kept.iterdir()} == {"power-0.05.safetensors", "power-0.1.safetensors"}
        _, network, facts = load_model(kept / "power-0.05.safetensors")
        assert facts.nimg == nimg
        assert torch.equal(dict(network.named_parameters())[name], weights[nimg])


def test_averages_of_a_half_deleted_checkpoint_are_kept_when_the_run_goes_on(small):
    small.save()
    small.checkpoints.wait()
    place = Path(small.place())
    place.rename(place.with_name(f".{place.name}.old"))  # killed right after the renaming
    (place.parent / ".000000099.part" / "state").mkdir(parents=True)
    small.checkpoints.tidy()
    assert not list(place.parent.iterdir())
    kept = [file.relative_to(small.checkpoints.run) for file in files(small.checkpoints.run)]
    assert kept == [Path("snapshots/000000000/power-0.1.safetensors")]


def test_a_damaged_old_one_does_not_keep_newer_ones_from_being_saved(tmp_path):
    small = Small(tmp_path, keep=1)
    for k in range(3):
        small.save()
        small.checkpoints.wait()
        if k == 0:
            (Path(small.place()) / "complete.json").write_text("{")
        small.counters.nimg += BATCH
    assert [int(folder.name) for folder in checkpoint_folders(tmp_path)] == [2 * BATCH]


def test_the_forecast_of_the_size_is_right(tmp_path):
    """Within five per cent; of a model whose headers do not count for more than its weights."""
    small = Small(tmp_path, dim=192)
    logging = LoggingConfig(keep_checkpoints=1, checkpoint_nimg=4 * BATCH, milestone_nimg=8 * BATCH)
    small.config = small.config.model_copy(update={"logging": logging})
    small.checkpoints = Checkpoints(tmp_path, small.trained, small.config, small.parallel)
    milestones = milestones_of(small.config)
    assert milestones == [False, True, True, False, True, True]
    saver = Saver(small.checkpoints, lambda *_: None)
    for milestone in milestones:
        saver.save(small.counters, FACTS, keep_forever=milestone)
        small.counters.nimg += BATCH
    saver.finish()
    one = sum(file.stat().st_size for file in files(checkpoint_folders(tmp_path)[0]))
    assert saver.bytes == pytest.approx(one, rel=0.05)
    sentence = saver.forecast(tmp_path)
    need = float(sentence.split("will need up to ")[1].split(" MB")[0].replace(",", "")) * 1e6
    assert need == pytest.approx(sum(file.stat().st_size for file in files(tmp_path)) + one, rel=0.05)
    assert "5 of them" in sentence  # four milestones, and the last one that is none
    assert len(checkpoint_folders(tmp_path)) == 5
