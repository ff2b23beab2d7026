"""The step, and the masks of a stage."""

import pytest
import torch
from torch import nn

from shoestring.config import (
    ExpertsConfig,
    MixerConfig,
    OptimizerConfig,
    StageConfig,
    TokensConfig,
    TransformerConfig,
)
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning
from shoestring.models.microdit import MicroDiT
from shoestring.runtime import Workers, stream
from shoestring.training.optim import Optimizers
from shoestring.training.schedule import Position
from shoestring.training.step import Draws, Learner, StepResult, TrainingBatch, train_step

SMALL = TransformerConfig(
    in_channels=3,
    caption_dim=8,
    dim=32,
    depth=3,
    head_dim=16,
    ffn_multiple_of=16,
    mixer=MixerConfig(depth=1, dim=48),
    experts=ExpertsConfig(count=4),
)


def stage(**changes) -> StageConfig:
    return StageConfig(**{"name": "s", "nimg": 1000, "batch": 10, "lr": 1.0} | changes)


def test_mask_ratio_moves_in_sixteenths():
    moving = stage(mask_ratio=0.75, mask_ratio_end=0.0)
    ratios = [moving.mask_ratio_at(nimg) for nimg in range(0, 1000, 10)]
    assert ratios[0] == 0.75
    assert ratios[-1] == 0.0
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios)) == 13
    assert stage(mask_ratio=0.5).mask_ratio_at(700) == 0.5
    assert stage(mask_ratio=0.99, mask_ratio_end=0.5).mask_ratio_at(0) < 1


GRADIENT_DESCENT = OptimizerConfig(beta1=0.0, beta2=0.0, eps=1e8, weight_decay=0.0)
"""With eps far above the gradient, AdamW at learning rate eps is gradient descent at rate 1."""


# -- the step ----------------------------------------------------------------------------------------------


def learner(workers: int = 1, kind: str = "adamw") -> Learner:
    model = MicroDiT(SMALL)
    model.initialize(stream(0, "init"))  # wholly random weights make tokens alike, experts' choices near ties
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=stream(0, "test", i)))
    optimizer = OptimizerConfig(kind=kind)
    return Learner.build(
        model, TokensConfig(), EDMProcess(0.6), optimizer, Workers(workers), power_ema=(0.1,)
    )


def step(
    one: Learner,
    data: TrainingBatch,
    lr: float = 1e-3,
    mask_ratio: float = 0.0,
    micro: int = 8,
    done: int = 0,
    **changes: object,
) -> StepResult:
    """A step of eight images, after ``done`` images of a stage with some settings."""
    return train_step(one, data, micro, lr, mask_ratio, Position(0, stage(batch=8, **changes), 0, done, 0))


def state(one: Learner) -> dict[str, torch.Tensor]:
    """Copies of weights and optimiser state."""
    weights = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    return weights | {name: tensor.clone() for name, tensor in one.optimizers.tensors().items()}


def batch(count: int = 8) -> TrainingBatch:
    draws = Draws.make(0, "train", 0, count, (3, 8, 8), 16)
    text = Conditioning(torch.randn(count, 4, 8, generator=stream(0, "text")))
    return TrainingBatch(
        torch.randn(count, 3, 8, 8, generator=stream(0, "x")), text, draws.noise, draws.level_B, draws.mask_BL
    )


def test_draws_of_a_sample_do_not_depend_on_its_batch():
    whole = Draws.make(3, "train", 100, 6, (3, 4, 4), 16)
    piece = Draws.make(3, "train", 102, 2, (3, 4, 4), 16)
    for name in ("level_B", "noise", "posterior", "mask_BL", "drop_B"):
        assert torch.equal(getattr(whole, name)[2:4], getattr(piece, name))
    assert not torch.equal(whole.noise[0], whole.noise[1])
    assert not torch.equal(Draws.make(4, "train", 100, 6, (3, 4, 4), 16).noise, whole.noise)


@pytest.mark.parametrize(("workers", "micro"), [(1, 2), (2, 8), (2, 4), (3, 8)])
def test_pieces_of_a_batch_give_the_gradient_of_the_whole(workers, micro):
    plain, pieces = learner(), learner(workers)
    for one in (plain, pieces):  # AdamW would make as much of a gradient's rounding as of the gradient
        one.optimizers = Optimizers(one.model, GRADIENT_DESCENT, one.workers)
    a = step(plain, batch(), 1e8, mask_ratio=0.5, ema_decay=0.5, clip_norm=1.0)
    b = step(pieces, batch(), 1e8, mask_ratio=0.5, micro=micro, ema_decay=0.5, clip_norm=1.0)
    assert (float(a.loss), float(a.norm)) == pytest.approx((float(b.loss), float(b.norm)), rel=1e-5)
    for p, q in zip(plain.model.parameters(), pieces.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_repeats_bit_for_bit(kind):
    results = []
    for _ in range(2):
        one = learner(workers=2, kind=kind)
        for i in range(3):
            step(one, batch(), mask_ratio=0.5, done=8 * i, ema_decay=0.9)
        results.append([*one.model.parameters(), *one.averages.tensors().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_clipping_bounds_the_update():
    one = learner()
    one.optimizers = Optimizers(one.model, GRADIENT_DESCENT, one.workers)
    before = [p.detach().clone() for p in one.model.parameters()]
    norm = step(one, batch(), 1e8, clip_norm=0.01, ema_decay=None).norm
    moved = torch.stack([(p - q).norm() for p, q in zip(one.model.parameters(), before, strict=True)]).norm()
    assert norm > 0.01
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_training_learns_a_constant_picture():
    one = learner(kind="muon")
    target = batch()
    target = TrainingBatch(
        torch.full_like(target.x0, 0.5), target.conditioning, target.noise, target.level_B, target.mask_BL
    )
    losses = [float(step(one, target, 0.01, 0.5, done=8 * i).loss) for i in range(30)]
    assert losses[-1] < losses[0] / 5


def broken_batch() -> TrainingBatch:
    data = batch()
    data.x0[3, 0, 0, 0] = float("nan")
    return data


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_loss_that_is_not_finite_changes_nothing(kind, workers):
    one = learner(workers, kind)
    for i in range(2):  # moments that are not zero
        step(one, batch(), mask_ratio=0.5, done=8 * i)
    before, averages = state(one), {k: v.clone() for k, v in one.averages.tensors().items()}
    result = step(one, broken_batch(), done=16)
    assert result.loss.isnan()
    after = state(one)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(tensor.any() for name, tensor in before.items() if "exp_avg" in name or "momentum" in name)
    assert all(p.grad is None for p in one.model.parameters())
    # Averages go on towards weights that stand still: finite, and none passes beyond them.
    weights = dict(one.model.named_parameters())
    assert len(one.averages.tracks) == 2
    for track in one.averages.tracks:
        for name, average in one.averages.named(track).items():
            way = (averages[f"{track}.{name}"] - weights[name]).abs()
            assert ((average - weights[name]).abs() <= way + 1e-7).all()
    step(one, batch(), mask_ratio=0.5, done=24)
    assert all(tensor.isfinite().all() for tensor in state(one).values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in state(one).items())


class Overflowing(torch.autograd.Function):
    """The identity, with a gradient that is infinite."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient + float("inf")


class Overflow(nn.Module):
    def forward(self, value):
        return Overflowing.apply(value)


def test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is():
    one = learner()
    step(one, batch(), mask_ratio=0.5)
    before = state(one)
    one.model.final_layer.linear = nn.Sequential(one.model.final_layer.linear, Overflow())
    result = step(one, batch(), done=8)
    assert result.loss.isfinite()
    assert not result.norm.isfinite()
    one.model.final_layer.linear = one.model.final_layer.linear[0]
    after = state(one)
    assert all(torch.equal(after[name], before[name]) for name in before)
