"""Groups of parameters, and the optimisers as one object."""

from __future__ import annotations

import pytest
import torch

from shoestring.config import ExpertsConfig, MixerConfig, OptimizerConfig, TokensConfig, TransformerConfig
from shoestring.models.microdit import MicroDiT
from shoestring.models.transformer import DiffusionTransformer
from shoestring.runtime import UserError, Workers, stream
from shoestring.training.optim import Optimizers, parameter_roles

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


def network(config: TransformerConfig = SMALL) -> DiffusionTransformer:
    model = MicroDiT(config)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=stream(0, "test", i)))
    return model


def set_gradients(model: torch.nn.Module, seed: int, value: float | None = None) -> None:
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=stream(seed, "gradient", i))
        if value is not None:
            parameter.grad.view(-1)[0] = value


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_groups_partition_the_parameters_and_none_is_empty(kind: str) -> None:
    model = MicroDiT(SMALL)
    groups = Optimizers(model, OptimizerConfig(kind=kind, weight_decay=0.1), Workers(1)).groups
    grouped = [id(p) for group in groups for p in group.parameters.values()]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert all(group.parameters for group in groups)
    assert {group.role for group in groups} == {"block_matrix", "expert", "matrix", "router", "vector"}
    for group in groups:
        assert (group.weight_decay > 0) == (group.role in {"block_matrix", "expert", "matrix"}), group.role
        assert group.muon == (kind == "muon" and group.role in {"block_matrix", "expert"}), group.role


def test_roles_follow_module_types() -> None:
    roles = parameter_roles(MicroDiT(SMALL))
    assert roles["blocks.1.mlp.w1"] == roles["blocks.1.mlp.w2"] == "expert"
    assert roles["blocks.1.mlp.gate.weight"] == "router"
    assert roles["blocks.0.mlp.w1.weight"] == roles["patch_mixer.0.attn.qkv.weight"] == "block_matrix"
    assert roles["blocks.0.adaLN_modulation.1.weight"] == "matrix"
    assert roles["x_embedder.proj.weight"] == roles["final_layer.linear.weight"] == "matrix"
    assert roles["y_embedder.y_proj.fc1.weight"] == "matrix"
    assert roles["blocks.0.norm1.weight"] == roles["final_layer.linear.bias"] == "vector"
    classes = SMALL.model_copy(update={"condition": "class", "classes": 7})
    roles = parameter_roles(MicroDiT(classes, TokensConfig(method="sprint", first=1, last=2)))
    assert roles["y_embedder.embedding_table.weight"] == roles["routing.mask_token"] == "embedding"
    assert roles["routing.fusion.weight"] == "matrix"


def test_expert_and_muon_learning_rates_scale() -> None:
    config = OptimizerConfig(kind="muon", expert_lr_scale=0.5, muon_lr_scale=3.0)
    optimizers = Optimizers(MicroDiT(SMALL), config, Workers(1))
    assert {group.role: group.lr_scale for group in optimizers.groups} == pytest.approx(
        {"block_matrix": 3.0, "expert": 1.5, "matrix": 1.0, "router": 1.0, "vector": 1.0}
    )


def test_an_expert_scale_without_experts_is_a_mistake() -> None:
    plain = SMALL.model_copy(update={"experts": ExpertsConfig(count=0)})
    with pytest.raises(UserError, match=r"expert_lr_scale is 0\.5, but the model has no experts"):
        Optimizers(MicroDiT(plain), OptimizerConfig(expert_lr_scale=0.5), Workers(1))


def test_released_recipe_decays_everything() -> None:
    config = OptimizerConfig(decay_everything=True, weight_decay=0.1)
    assert {group.weight_decay for group in Optimizers(MicroDiT(SMALL), config, Workers(1)).groups} == {0.1}


def test_adamw_equals_torch() -> None:
    model, other = network(), network()
    optimizers = Optimizers(model, OptimizerConfig(weight_decay=0.1), Workers(1))
    matrices = [p for n, p in other.named_parameters() if p.ndim >= 2 and "gate" not in n]
    rest = [p for n, p in other.named_parameters() if p.ndim < 2 or "gate" in n]
    reference = torch.optim.AdamW(
        [{"params": matrices}, {"params": rest, "weight_decay": 0.0}], lr=0.01, weight_decay=0.1, fused=True
    )
    optimizers.set_lr(0.01)
    for i in range(3):
        set_gradients(model, i)
        set_gradients(other, i)
        optimizers.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_a_step_found_infinite_changes_no_bit(kind: str, value: float) -> None:
    """Weights, moments and step counts; the steps around it are those of a run without it."""
    config = OptimizerConfig(kind=kind, weight_decay=0.1)
    model, plain = network(), network()
    optimizers, undisturbed = (Optimizers(m, config, Workers(2)) for m in (model, plain))
    for each in (optimizers, undisturbed):
        each.set_lr(0.01)
    for i, found in enumerate([0.0, 1.0, 0.0]):
        set_gradients(model, i, value if found else None)
        set_gradients(plain, i)
        before = [t.clone() for t in [*model.parameters(), *optimizers.tensors().values()]]
        optimizers.step(torch.tensor(found))
        after = [*model.parameters(), *optimizers.tensors().values()]
        same = [
            torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(before, after, strict=True)
        ]
        assert all(same) if found else not any(same)
        if not found:
            undisturbed.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_is_allocated_at_once_and_loading_writes_into_it(kind: str) -> None:
    config = OptimizerConfig(kind=kind)
    model = network()
    optimizers = Optimizers(model, config, Workers(1))
    empty = optimizers.tensors()
    expected = {
        f"{name}.{key}"
        for group in optimizers.groups
        for name in group.parameters
        for key in (["momentum_buffer"] if group.muon else ["step", "exp_avg", "exp_avg_sq"])
    }
    assert set(empty) == expected
    for i in range(3):
        set_gradients(model, i)
        optimizers.set_lr(0.01)
        optimizers.step()
    again = network()
    loaded = Optimizers(again, config, Workers(1))
    assert list(loaded.tensors()) == list(empty)
    with torch.no_grad():
        for name, tensor in loaded.tensors().items():
            tensor.copy_(optimizers.tensors()[name])
        for a, b in zip(again.parameters(), model.parameters(), strict=True):
            a.copy_(b)
    for each, one in ((optimizers, model), (loaded, again)):
        set_gradients(one, 9)
        each.set_lr(0.01)
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(t, loaded.tensors()[n]) for n, t in optimizers.tensors().items())


def test_a_parameter_without_gradient_stays() -> None:
    model = network()
    optimizers = Optimizers(model, OptimizerConfig(kind="muon", weight_decay=0.1), Workers(1))
    set_gradients(model, 0)
    left_out = [model.blocks[0].attn.qkv.weight, model.blocks[1].mlp.w1, model.final_layer.linear.weight]
    for parameter in left_out:
        parameter.grad = None
    before = [p.detach().clone() for p in left_out]
    optimizers.set_lr(0.1)
    optimizers.step()
    assert all(torch.equal(a, b) for a, b in zip(before, left_out, strict=True))


def test_weights_in_float64_keep_moments_in_float64() -> None:
    model = network().double()
    optimizers = Optimizers(model, OptimizerConfig(kind="muon"), Workers(1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.set_lr(0.01)
    optimizers.step(torch.zeros(()))
    kinds = {t.dtype for n, t in optimizers.tensors().items() if not n.endswith(".step")}
    assert kinds == {torch.float64}
