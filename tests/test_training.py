"""The step, and the masks of a stage."""

import pytest
import torch

from shoestring.config import (
    ExpertsConfig,
    MixerConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TokensConfig,
)
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning
from shoestring.models.microdit import MicroDiT
from shoestring.runtime import Workers, stream
from shoestring.training.averages import Averages
from shoestring.training.optim import Optimizers
from shoestring.training.step import Draws, Learner, NonFiniteLoss, TrainingBatch, train_step

SMALL = ModelConfig(
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
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=stream(0, "test", i)))
    process = EDMProcess(0.6)
    threads = Workers(workers)
    optimizers = Optimizers(model, OptimizerConfig(kind=kind), threads)
    return Learner(
        model, TokensConfig(), process, process.denoiser(model), optimizers, Averages(model), threads
    )


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


@pytest.mark.parametrize(("workers", "micro"), [(1, 2), (2, None), (2, 4), (3, None)])
def test_pieces_of_a_batch_give_the_gradient_of_the_whole(workers, micro):
    plain, pieces = learner(), learner(workers)
    settings = {"lr": 1e-3, "mask_ratio": 0.5, "ema_decay": 0.5}
    a = train_step(plain, batch(), stage(batch=8, clip_norm=None), **settings)
    b = train_step(pieces, batch(), stage(batch=8, micro_batch=micro, clip_norm=None), **settings)
    assert a == pytest.approx(b, rel=1e-5)
    for p, q in zip(plain.model.parameters(), pieces.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_repeats_bit_for_bit(kind):
    results = []
    for _ in range(2):
        one = learner(workers=2, kind=kind)
        for _ in range(3):
            train_step(one, batch(), stage(batch=8), 1e-3, 0.5, 0.9)
        results.append([*one.model.parameters(), *one.averages.tensors().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_clipping_bounds_the_update():
    one = learner()
    one.optimizers = Optimizers(one.model, GRADIENT_DESCENT, one.workers)
    before = [p.detach().clone() for p in one.model.parameters()]
    _, norm = train_step(one, batch(), stage(batch=8, clip_norm=0.01), 1e8, 0.0, 0.0)
    moved = torch.stack([(p - q).norm() for p, q in zip(one.model.parameters(), before, strict=True)]).norm()
    assert norm > 0.01
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_training_learns_a_constant_picture():
    one = learner(kind="muon")
    target = batch()
    target = TrainingBatch(
        torch.full_like(target.x0, 0.5), target.conditioning, target.noise, target.level_B, target.mask_BL
    )
    losses = [train_step(one, target, stage(batch=8), 0.01, 0.5, 0.9)[0] for _ in range(30)]
    assert losses[-1] < losses[0] / 5


def test_a_loss_that_is_not_finite_changes_nothing():
    one = learner()
    before = [p.detach().clone() for p in one.model.parameters()]
    broken = batch()
    broken.x0[3, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteLoss, match="nan"):
        train_step(one, broken, stage(batch=8), 1e-3, 0.0, 0.9)
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), before, strict=True))
    assert all(p.grad is None for p in one.model.parameters())
