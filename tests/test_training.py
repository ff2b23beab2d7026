"""Optimisers, averages, schedules and the step."""

import pytest
import torch
from torch import nn

from shoestring.config import (
    ExpertsConfig,
    MixerConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    TokensConfig,
)
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning
from shoestring.models.microdit import MicroDiT
from shoestring.runtime import Workers, stream
from shoestring.training.ema import EMA
from shoestring.training.muon import Muon, orthogonalize
from shoestring.training.optim import Optimizers, parameter_roles
from shoestring.training.schedule import ema_decay, learning_rate, position
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


# -- Muon --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_muon_equals_torch_on_matrices(shape, adjust):
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = Muon([ours], lr=0.02, weight_decay=0.1, momentum=0.9, ns_steps=5, adjust=adjust, workers=Workers(2))
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, ns_steps=5, adjust_lr_fn=adjust)
    for i in range(4):
        ours.grad = theirs.grad = torch.randn(shape, generator=stream(i, "grad"))
        a.step()
        b.step()
    # Newton-Schulz runs in bf16 (8 bits); updates here are of size lr.
    assert (ours - theirs).abs().max() < 2e-3 * 0.02 * 4 * max(shape) ** 0.5
    assert (ours - start).abs().max() > 0.01


def test_muon_treats_every_expert_by_itself():
    experts = nn.Parameter(torch.randn(3, 16, 24))
    # Linear weights are (out, in), experts (in, out): the learning rate is adjusted by the same shape.
    single = [nn.Parameter(experts[i].detach().T.clone()) for i in range(3)]
    gradient = torch.randn(3, 16, 24) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    experts.grad = gradient
    settings = {
        "lr": 0.1,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "ns_steps": 5,
        "adjust": "original",
        "workers": Workers(1),
    }
    Muon([experts], **settings).step()
    for p, g in zip(single, gradient, strict=True):
        p.grad = g.T.clone()
    Muon(single, **settings).step()
    assert torch.allclose(experts, torch.stack([p.T for p in single]), atol=2e-3)


def test_orthogonalised_matrices_have_singular_values_near_one():
    for shape in ((20, 60), (2, 60, 20)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), 5).float())
        assert values.min() > 0.6
        assert values.max() < 1.3


# -- groups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_groups_partition_the_parameters_and_none_is_empty(kind):
    model = MicroDiT(SMALL)
    optimizers = Optimizers(model, OptimizerConfig(kind=kind, weight_decay=0.1), Workers(1))
    groups = [g for optimizer in optimizers.optimizers for g in optimizer.param_groups]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert len({id(p) for g in groups for p in g["params"]}) == len(list(model.parameters()))
    assert all(g["params"] for g in groups)
    assert {g["role"] for g in groups} == {"block_matrix", "expert", "matrix", "router", "vector"}
    for group in groups:
        decayed = group["role"] in {"block_matrix", "expert", "matrix"}
        assert (group["weight_decay"] > 0) == decayed, group["role"]


def test_roles_follow_module_types():
    roles = parameter_roles(MicroDiT(SMALL))
    assert roles["blocks.1.mlp.w1"] == roles["blocks.1.mlp.w2"] == "expert"
    assert roles["blocks.1.mlp.gate.weight"] == "router"
    assert roles["blocks.0.mlp.w1.weight"] == roles["patch_mixer.0.attn.qkv.weight"] == "block_matrix"
    assert roles["blocks.0.adaLN_modulation.1.weight"] == "matrix"
    assert roles["x_embedder.proj.weight"] == roles["final_layer.linear.weight"] == "matrix"
    assert roles["blocks.0.norm1.weight"] == roles["final_layer.linear.bias"] == "vector"


def test_expert_and_muon_learning_rates_scale():
    config = OptimizerConfig(kind="muon", expert_lr_scale=0.5, muon_lr_scale=3.0)
    optimizers = Optimizers(MicroDiT(SMALL), config, Workers(1))
    optimizers.set_lr(0.1)
    rates = {g["role"]: g["lr"] for o in optimizers.optimizers for g in o.param_groups}
    assert rates == pytest.approx(
        {"block_matrix": 0.3, "expert": 0.15, "matrix": 0.1, "router": 0.1, "vector": 0.1}
    )


def test_released_recipe_decays_everything():
    optimizers = Optimizers(
        MicroDiT(SMALL), OptimizerConfig(decay_everything=True, weight_decay=0.1), Workers(1)
    )
    assert {g["weight_decay"] for g in optimizers.optimizers[0].param_groups} == {0.1}


# -- schedules ---------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls():
    cosine = stage(warmup_nimg=100, lr_schedule="cosine", lr_end_ratio=0.1)
    assert learning_rate(cosine, 0) == pytest.approx(0.1)
    assert learning_rate(cosine, 90) == pytest.approx(1.0)
    assert learning_rate(cosine, 540) == pytest.approx(0.55, abs=0.01)
    assert learning_rate(cosine, 990) == pytest.approx(0.1)
    linear = stage(lr_schedule="linear", lr_end_ratio=0.0)
    assert learning_rate(linear, 490) == pytest.approx(0.5)
    assert learning_rate(stage(), 490) == 1.0


def test_learning_rate_does_not_depend_on_the_batch_beyond_one_step():
    fine, coarse = (stage(batch=b, lr_schedule="cosine") for b in (10, 100))
    assert learning_rate(fine, 490) == pytest.approx(learning_rate(coarse, 400))


def test_mask_ratio_moves_in_sixteenths():
    moving = stage(mask_ratio=0.75, mask_ratio_end=0.0)
    ratios = [moving.mask_ratio_at(nimg) for nimg in range(0, 1000, 10)]
    assert ratios[0] == 0.75
    assert ratios[-1] == 0.0
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios)) == 13
    assert stage(mask_ratio=0.5).mask_ratio_at(700) == 0.5
    assert stage(mask_ratio=0.99, mask_ratio_end=0.5).mask_ratio_at(0) < 1


def test_ema_starts_late_and_ramps_up_over_stages():
    def decays(*stages):
        config = RunConfig(name="r", stages=stages)
        return [ema_decay(position(config, nimg)) for nimg in range(0, config.nimg, 10)]

    late = decays(stage(nimg=60, ema_decay=0.99, ema_start_nimg=50, ema_rampup=None))
    assert late == [0.0] * 5 + [0.99]
    ramp = decays(*[stage(nimg=100, ema_decay=0.9999, ema_rampup=0.1, name=n) for n in "ab"])
    assert ramp[9] == pytest.approx(0.5)  # half-life: a tenth of 100 images, one step
    assert ramp == sorted(ramp)
    assert decays(stage(nimg=100, ema_decay=None)) == [0.0] * 10
    again = decays(stage(nimg=50), stage(nimg=50, ema_decay=None), stage(nimg=50))
    assert again[:5] == again[10:]
    assert again[5:10] == [0.0] * 5


def test_position_finds_the_stage():
    config = RunConfig(name="r", stages=(stage(nimg=95, name="a"), stage(nimg=50, name="b")))
    assert config.nimg == 150  # 95 images are ten whole batches
    found = [position(config, nimg) for nimg in (0, 90, 100, 140, 150)]
    assert [(p.stage.name, p.start_nimg, p.done_nimg) for p in found[:4]] == [
        ("a", 0, 0),
        ("a", 0, 90),
        ("b", 100, 0),
        ("b", 100, 40),
    ]
    assert found[4] is None


def test_average_follows_the_weights():
    model = nn.Linear(3, 2)
    start = model.weight.detach().clone()
    ema = EMA(model)
    with torch.no_grad():
        model.weight += 1
    ema.update(0.75)
    assert torch.allclose(ema.average[0], start + 0.25)
    with ema.applied():
        assert torch.allclose(model.weight, start + 0.25)
    assert torch.allclose(model.weight, start + 1)
    ema.update(0.0)
    assert torch.equal(ema.average[0], model.weight)


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
    return Learner(model, TokensConfig(), process, process.denoiser(model), optimizers, EMA(model), threads)


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
        results.append([*one.model.parameters(), *one.ema.average])
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
