"""Guard rails: when a run is left alone, when it goes back, when it stops."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shoestring.config import (
    ExpertsConfig,
    GuardConfig,
    MixerConfig,
    NoiseConfig,
    RunConfig,
    StageConfig,
    TransformerConfig,
)
from shoestring.diffusion.losses import denoising_loss
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning
from shoestring.models.microdit import MicroDiT
from shoestring.runtime import stream
from shoestring.training.guard import Guard, GuardState, Verdict
from shoestring.training.schedule import position

BATCH = 10
CONFIG = RunConfig(
    name="r",
    stages=(
        StageConfig(name="first", nimg=20_000, batch=BATCH, lr=1e-3),
        StageConfig(name="second", nimg=20_000, batch=BATCH, lr=1e-4),
    ),
)
NAN = math.nan


def feed(
    guard: Guard,
    losses: Sequence[float],
    start: int = 0,
    config: RunConfig = CONFIG,
    norms: Sequence[float] | None = None,
) -> list[tuple[int, Verdict]]:
    """Step by step, as on a CPU; what was said or decided, by the images seen before the step."""
    found = []
    for i, loss in enumerate(losses):
        nimg = start + i * BATCH
        here = position(config, nimg)
        assert here is not None
        guard.enter(here)
        verdict = guard.observe(nimg + BATCH, [float(loss)], [1.0 if norms is None else norms[i]])
        if verdict.text is not None or verdict.action != "go":
            found.append((nimg, verdict))
        if verdict.action != "go":
            break
    return found


def curve(steps: int, noise: float, seed: int = 0, start: float = 1.0, end: float = 0.2) -> np.ndarray:
    """A falling training loss with log-normal noise."""
    numbers = np.random.RandomState(seed)
    level = end + (start - end) * np.exp(-np.arange(steps) / 60)
    return level * np.exp(noise * numbers.standard_normal(steps))


def new(state: GuardState | None = None, **changes: object) -> Guard:
    return Guard(GuardConfig(**changes), state if state is not None else GuardState())


# -- false alarms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 0.3, 0.7])
def test_ordinary_curves_are_left_alone(noise: float) -> None:
    for seed in range(6):
        assert feed(new(), curve(1500, noise, seed)) == []


def test_heavy_tails_give_no_divergence_and_few_spikes() -> None:
    # Losses of single samples at all noise levels: one in a thousand is twenty times the median.
    spikes = 0
    for seed in range(6):
        tails = np.exp(np.random.RandomState(seed).standard_t(3, 1500) * 0.3)
        found = feed(new(), curve(1500, 0.1, seed) * tails)
        assert {verdict.action for _, verdict in found} <= {"go"}
        spikes += len(found)
    assert spikes < 20  # of 9,000


def test_a_rise_after_a_stage_begins_is_not_a_divergence() -> None:
    """Without moments and warm-up the loss may double for a while."""
    guard = new()
    assert feed(guard, curve(2000, 0.05)) == []
    bump = 0.2 + 0.5 * np.exp(-(((np.arange(1500) - 90) / 40) ** 2))
    assert feed(guard, bump * np.exp(0.05 * np.random.RandomState(1).standard_normal(1500)), 20_000) == []


def test_other_levels_of_other_stages_and_mask_ratios_do_not_count() -> None:
    guard = new()
    feed(guard, curve(2000, 0.05))
    assert feed(guard, np.full(1000, 2.0), start=20_000) == []  # ten times the loss of the first stage
    masked = StageConfig(name="m", nimg=20_000, batch=BATCH, lr=1e-3, mask_ratio=0.5, mask_ratio_end=0.0)
    config = RunConfig(name="r", stages=(masked,))
    jumps = np.repeat([0.2, 0.5, 1.2, 3.0], 500)  # at other places than the ratio's steps: a divergence
    ratios = [masked.mask_ratio_at(i * BATCH) for i in range(2000)]
    steady = [0.2 + 4 * (0.5 - ratio) for ratio in ratios]
    assert len(set(ratios)) == 9
    assert feed(new(), steady, config=config) == []
    assert feed(new(), jumps)[-1][1].action == "roll back"


# -- spikes and divergence ---------------------------------------------------------------------------------


def test_a_spike_is_said_and_training_goes_on() -> None:
    losses = curve(1000, 0.1)
    losses[600:603] *= 30
    guard = new()
    found = feed(guard, losses[:610])
    assert [(nimg, verdict.action, verdict.what) for nimg, verdict in found] == [(6000, "go", "loss-spike")]
    text = found[0][1].text
    assert text is not None
    assert "image 6,000 (stage 'first')" in text
    assert guard.state.spikes == 3
    assert guard.bad_since == 6000 - 64 * BATCH
    assert feed(guard, losses[610:666], start=6100) == []
    assert guard.bad_since is not None  # 63 good steps
    assert feed(guard, losses[666:667], start=6660) == []
    assert guard.bad_since is None


@pytest.mark.parametrize(("noise", "rise"), [(0.02, 2.5), (0.1, 3.0), (0.5, 12.0)])
def test_a_lasting_rise_goes_back(noise: float, rise: float) -> None:
    losses = curve(1000, noise)
    losses[600:] *= rise
    guard = new()
    nimg, verdict = feed(guard, losses)[-1]
    assert verdict.action == "roll back"
    assert 6000 < nimg <= 6000 + 40 * BATCH
    assert guard.bad_since is not None
    assert guard.bad_since <= 6000 - 60 * BATCH
    assert guard.good_checkpoint([2000, 4000, 5500, 6100]) == 4000
    assert guard.good_checkpoint([5500, 5900, 6300]) == 5500  # none was tried enough: the oldest before
    assert guard.good_checkpoint([6200]) is None


def test_a_slow_rise_goes_back_too() -> None:
    losses = curve(2000, 0.1) * np.exp(np.maximum(0, np.arange(2000) - 800) / 400)
    nimg, verdict = feed(new(), losses)[-1]
    assert verdict.action == "roll back"
    assert nimg < 13_000


def test_an_explosion_in_the_first_steps_goes_back() -> None:
    losses = np.exp(np.minimum(np.arange(200) / 4, 20))
    nimg, verdict = feed(new(), losses)[-1]
    assert verdict.action == "roll back"
    assert nimg < 60 * BATCH


# -- steps that are not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (1.0, math.inf), (math.inf, NAN)])
def test_steps_that_are_not_finite_are_counted_and_too_many_go_back(loss: float, norm: float) -> None:
    losses, norms = curve(400, 0.1), np.ones(400)
    for i in range(300, 305):
        losses[i], norms[i] = losses[i] * loss if loss != 1 else losses[i], norm
    guard = new()
    found = feed(guard, losses, norms=list(norms))
    assert [verdict.action for _, verdict in found] == ["go"] * 4 + ["roll back"]
    assert found[0][1].what == "skipped"
    assert "was skipped" in (found[0][1].text or "")
    assert guard.state.skipped == 5
    assert guard.state.trouble == 3000


def test_now_and_then_a_step_may_be_skipped() -> None:
    losses = curve(2000, 0.1)
    losses[::40] = NAN  # four of any window of 128
    guard = new()
    assert {verdict.action for _, verdict in feed(guard, losses)} == {"go"}
    assert guard.state.skipped == 50
    losses[::25] = NAN
    assert feed(new(), losses)[-1][1].action == "roll back"


def test_broken_records_are_no_fault_of_the_training() -> None:
    guard = new()
    guard.enter(position(CONFIG, 0))
    record = "record r000031 of /store holds NaN or infinity (latents)"
    for step in range(1, 5):
        nimg = step * BATCH
        verdict = guard.observe(nimg, [NAN], [NAN], {nimg - BATCH: [record]})
        assert verdict.action == "go"
        assert record in (verdict.text or "")
    assert guard.bad_since is None
    verdict = guard.observe(5 * BATCH, [NAN], [NAN], {4 * BATCH: [record]})
    assert verdict.action == "stop"
    words = guard.last_words("checkpoints/000000000")
    assert words.count("record r000031") == 1
    assert "take these records out" in words
    assert "lower" not in words


# -- going back, and giving up -----------------------------------------------------------------------------


def test_after_each_roll_back_the_rate_falls_until_the_run_stops() -> None:
    state = GuardState()
    for number in range(4):
        guard = new(state)
        assert guard.lr_scale == 0.5**number
        assert guard.data_shift == number
        saved = GuardState(**json.loads(json.dumps(asdict(state))))
        losses = curve(900, 0.1, number)
        losses[600:] = 40.0
        _, verdict = feed(guard, losses)[-1]
        assert verdict.action == ("roll back" if number < 3 else "stop")
        if number < 3:
            sentence = guard.rolled_back(saved, "checkpoints/000003000")
            assert f"{0.5 ** (number + 1):g} times the learning rate (roll-back {number + 1} of" in sentence
            state = guard.state
            assert state.rollbacks == number + 1
            assert state.trouble is None
    words = guard.last_words("runs/r/checkpoints/000004000")
    for part in (
        "the loss has been 40 for ",
        "stage 'first'",
        "000004000",
        "3 roll-backs",
        "stages.first.lr",
    ):
        assert part in words
    assert "\n" not in words
    report = guard.report("runs/r/checkpoints/000004000")
    assert report.startswith(words)
    last = [line.split() for line in report.splitlines()[-3:]]
    assert [row[1:] for row in last] == [["40", "1", "first"]] * 3
    assert len({row[0] for row in last}) == 3


def test_going_back_restores_the_statistics_but_not_the_counts() -> None:
    losses = curve(700, 0.1)
    guard = new()
    feed(guard, losses[:400])
    saved = GuardState(**json.loads(json.dumps(asdict(guard.state))))
    losses[500] = NAN
    losses[600:] = NAN
    assert feed(guard, losses[400:], start=4000)[-1][1].action == "roll back"
    guard.rolled_back(saved, "there")
    after = guard.state
    assert after.history == saved.history
    assert (after.skipped, after.rollbacks, after.skips) == (5, 1, [])
    guard.rolled_back(None, "the beginning")
    assert (guard.state.history, guard.state.skipped, guard.state.rollbacks) == ([], 5, 2)


def test_without_roll_backs_the_first_divergence_stops() -> None:
    guard = new(max_rollbacks=0, max_skips=1)
    (_, verdict), *_ = feed(guard, [1.0, NAN])
    assert verdict.action == "stop"
    assert "roll-backs" not in guard.last_words(None)
    assert "there is no good checkpoint" in guard.last_words(None)


# -- exactly restorable ------------------------------------------------------------------------------------


def faulty() -> np.ndarray:
    losses = curve(1400, 0.2, 5)
    losses[[300, 310, 700]] = NAN
    losses[500:504] *= 50
    losses[1100:] *= 8
    return losses


def test_a_resumed_guard_says_what_an_undisturbed_one_says() -> None:
    undisturbed, losses = new(), faulty()
    said = feed(undisturbed, losses)
    assert said[-1][1].action == "roll back"
    for cut in (1, 100, 309, 502, 1110):
        first = new()
        heard = feed(first, losses[:cut])
        second = new(GuardState(**json.loads(json.dumps(asdict(first.state)))))
        heard += feed(second, losses[cut:], start=cut * BATCH)
        assert heard == said
        assert second.state == undisturbed.state


def test_many_steps_at_once_are_as_one_by_one() -> None:
    single, at_once, losses = new(), new(), faulty()
    last = feed(single, losses)[-1]
    for start in range(0, len(losses), 37):
        part = [float(x) for x in losses[start : start + 37]]
        at_once.enter(position(CONFIG, start * BATCH))
        verdict = at_once.observe((start + len(part)) * BATCH, part, [1.0] * len(part))
        if verdict.action != "go":
            break
    assert verdict == last[1]
    assert at_once.state == single.state


# -- a real training ---------------------------------------------------------------------------------------

SMALL = TransformerConfig(
    in_channels=3,
    condition="none",
    dim=32,
    depth=1,
    head_dim=16,
    ffn_multiple_of=16,
    mixer=MixerConfig(depth=0),
    experts=ExpertsConfig(count=0),
)


class Training:
    """A tiny network on smooth random pictures, by hand: AdamW, no clipping, tiny batches."""

    def __init__(self) -> None:
        self.model = MicroDiT(SMALL)
        self.model.initialize(stream(0, "init"))
        self.process = EDMProcess(0.5)
        self.denoiser = self.process.denoiser(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)

    def step(self, nimg: int, lr: float, shift: int = 0) -> tuple[float, float]:
        generator = stream(shift, "train", nimg)
        colour = torch.randn(BATCH, 3, 1, 1, generator=generator)
        x0 = 0.5 * colour.expand(BATCH, 3, 8, 8)
        level = self.process.level_from_normal(torch.randn(BATCH, generator=generator), NoiseConfig())
        noise = torch.randn(x0.shape, generator=generator)
        loss = denoising_loss(
            self.process, self.denoiser, x0, noise, level, Conditioning.nothing(BATCH)
        ).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), math.inf)
        self.optimizer.param_groups[0]["lr"] = lr
        if (loss + norm).isfinite():
            self.optimizer.step()
        return loss.item(), norm.item()


def test_a_real_training_that_goes_well_is_left_alone() -> None:
    training, guard = Training(), new()
    losses = []
    for i in range(320):
        guard.enter(position(CONFIG, i * BATCH))
        loss, norm = training.step(i * BATCH, 3e-3)
        losses.append(loss)
        assert guard.observe((i + 1) * BATCH, [loss], [norm]) == Verdict("go")
    assert np.mean(losses[-50:]) < 0.5 * np.mean(losses[:10])
    assert np.std(np.log(losses[-100:])) > 0.1  # noisy it is


def test_a_real_training_that_diverges_is_brought_back() -> None:
    """The rate jumps; checkpoints are kept every 25 steps; the run ends where it should."""
    training, guard = Training(), new(window=32, warmup=16, good_after=16, lr_cut=0.02)
    kept: dict[int, tuple[dict[str, Tensor], GuardState]] = {}
    nimg, rollbacks, losses = 0, [], []
    while nimg < 200 * BATCH:
        if nimg % (25 * BATCH) == 0:
            copy = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
            kept[nimg] = copy, GuardState(**json.loads(json.dumps(asdict(guard.state))))
        guard.enter(position(CONFIG, nimg))
        lr = 3e-3 if nimg < 110 * BATCH else 0.15
        loss, norm = training.step(nimg, lr * guard.lr_scale, guard.data_shift)
        losses.append(loss)
        nimg += BATCH
        verdict = guard.observe(nimg, [loss], [norm])
        if verdict.action == "roll back":
            good = guard.good_checkpoint(list(kept))
            assert good is not None
            rollbacks.append((nimg, good))
            weights, state = kept[good]
            training.model.load_state_dict(weights)
            training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=0.0)
            assert "75" in guard.rolled_back(state, str(good))
            nimg = good
        assert verdict.action != "stop"
    assert len(rollbacks) == 1
    came, good = rollbacks[0]
    assert 1100 < came <= 1100 + 60 * BATCH
    assert good == 750
    assert guard.lr_scale == 0.02
    assert np.mean(losses[-30:]) < 0.7
