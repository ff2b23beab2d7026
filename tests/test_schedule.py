"""Learning rate, decay of the average, stage: functions of images seen."""

import math

import pytest
from pydantic import ValidationError

from shoestring.config import RunConfig, StageConfig
from shoestring.training.schedule import ema_decay, learning_rate, position


def stage(**changes) -> StageConfig:
    return StageConfig(**{"name": "s", "nimg": 1000, "batch": 10, "lr": 1.0} | changes)


def rates(stage: StageConfig) -> list[float]:
    return [learning_rate(stage, nimg) for nimg in range(0, stage.nimg, stage.batch)]


def test_closed_forms() -> None:
    """Every schedule at every step, written out; step i is scheduled by its last image, 10 (i + 1)."""
    for kind, shape in {
        "constant": lambda p: 1.0,
        "linear": lambda p: 1 - 0.9 * p,
        "cosine": lambda p: 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2,
    }.items():
        found = rates(stage(warmup_nimg=200, lr_schedule=kind, lr_end_ratio=0.1))
        expected = [(i + 1) / 20 if i < 19 else shape((i - 19) / 80) for i in range(100)]
        assert found == pytest.approx(expected), kind
    found = rates(stage(warmup_nimg=200, lr_schedule="wsd", lr_decay_share=0.25, lr_end_ratio=0.1))
    assert found == pytest.approx(
        [(i + 1) / 20 for i in range(20)] + [1.0] * 55 + [1 - 0.9 * (i + 1) / 25 for i in range(25)]
    )


def test_wsd_over_the_whole_stage_is_linear_and_warm_up_must_leave_room() -> None:
    assert rates(stage(lr_schedule="wsd", lr_decay_share=1.0)) == pytest.approx(
        rates(stage(lr_schedule="linear"))
    )
    with pytest.raises(ValidationError, match=r"warmup_nimg is 900, but .* from image 800 of the stage on"):
        stage(lr_schedule="wsd", warmup_nimg=900)
    with pytest.raises(ValidationError):
        stage(lr_schedule="wsd", lr_decay_share=0.0)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_learning_rate_does_not_depend_on_the_batch_beyond_one_step(kind: str) -> None:
    fine, coarse = (stage(batch=b, lr_schedule=kind, lr_decay_share=0.7) for b in (10, 100))
    assert learning_rate(fine, 490) == pytest.approx(learning_rate(coarse, 400))
    assert learning_rate(fine, 490) < 1


def test_ema_starts_late_and_ramps_up_over_stages() -> None:
    def decays(*stages: StageConfig) -> list[float]:
        config = RunConfig(name="r", stages=stages)
        return [ema_decay(position(config, nimg)) for nimg in range(0, config.nimg, 10)]

    late = decays(stage(nimg=60, ema_decay=0.99, ema_start_nimg=50, ema_rampup=None))
    assert late == [0.0] * 5 + [0.99]
    ramp = decays(*[stage(nimg=100, ema_decay=0.9999, ema_rampup=0.1, name=n) for n in "ab"])
    assert ramp[9] == pytest.approx(0.5)  # half-life: a tenth of 100 images, one step
    assert ramp == sorted(ramp)
    assert decays(stage(nimg=100, ema_decay=None)) == [0.0] * 10
    again = decays(stage(nimg=50), stage(nimg=50, ema_decay=None, name="b"), stage(nimg=50, name="c"))
    assert again[:5] == again[10:]
    assert again[5:10] == [0.0] * 5


def test_position_finds_the_stage() -> None:
    config = RunConfig(name="r", stages=(stage(nimg=95, name="a"), stage(nimg=50, name="b")))
    assert config.nimg == 150  # 95 images are ten whole batches
    found = [position(config, nimg) for nimg in (0, 90, 100, 140, 150)]
    assert [(p.stage.name, p.start_nimg, p.done_nimg) for p in found[:4] if p is not None] == [
        ("a", 0, 0),
        ("a", 0, 90),
        ("b", 100, 0),
        ("b", 100, 40),
    ]
    assert found[4] is None
