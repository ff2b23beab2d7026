"""Muon: against torch's on matrices, part by part, and the same bits where matrices lie on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from forks import run_ranks
from shoestring.config import ExpertsConfig, MixerConfig, OptimizerConfig, TransformerConfig
from shoestring.models.microdit import MicroDiT
from shoestring.runtime import Workers, stream
from shoestring.training.averages import Averages
from shoestring.training.muon import Matrices, Muon, orthogonalize
from shoestring.training.optim import Optimizers
from shoestring.training.parallel import shard_dimension, whole


def muon(parameters: list[nn.Parameter], workers: int = 1, parts: int = 1, **changes: Any) -> Muon:
    settings = {"momentum": 0.9, "ns_steps": 5, "adjust": "original"} | changes
    decay = settings.pop("weight_decay", 0.0)
    buffers = [torch.zeros_like(p) for p in parameters]
    groups = [Matrices(parameters, buffers, parts, weight_decay=decay)]
    return Muon(groups, workers=Workers(workers), **settings)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_equals_torch_on_matrices(shape: tuple[int, int], adjust: str) -> None:
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = muon([ours], workers=2, weight_decay=0.1, adjust=adjust)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, ns_steps=5, adjust_lr_fn=adjust)
    for i in range(4):
        ours.grad = theirs.grad = torch.randn(shape, generator=stream(i, "grad"))
        a.step(0.02)
        b.step()
    # Newton-Schulz runs in bf16 (8 bits); updates here are of size lr.
    assert (ours - theirs).abs().max() < 2e-3 * 0.02 * 4 * max(shape) ** 0.5
    assert (ours - start).abs().max() > 0.01


def test_every_expert_is_treated_by_itself() -> None:
    experts = nn.Parameter(torch.randn(3, 16, 24))
    # Linear weights are (out, in), experts (in, out): the learning rate is adjusted by the same shape.
    single = [nn.Parameter(experts[i].detach().T.clone()) for i in range(3)]
    gradient = torch.randn(3, 16, 24) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    experts.grad = gradient
    muon([experts], momentum=0.0).step(0.1)
    for p, g in zip(single, gradient, strict=True):
        p.grad = g.T.clone()
    muon(single, momentum=0.0).step(0.1)
    assert torch.allclose(experts, torch.stack([p.T for p in single]), atol=2e-3)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_queries_keys_and_values_are_treated_by_themselves(adjust: str) -> None:
    fused = nn.Parameter(torch.randn(3 * 16, 24))
    single = [nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    gradient = torch.randn(48, 24) * torch.tensor([1.0, 100.0, 0.01]).repeat_interleave(16)[:, None]
    fused.grad = gradient
    muon([fused], parts=3, adjust=adjust).step(0.1)
    for p, g in zip(single, gradient.chunk(3), strict=True):
        p.grad = g.clone()
    muon(single, adjust=adjust).step(0.1)
    assert torch.equal(fused, torch.cat([*single]))


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    for shape in ((20, 60), (2, 60, 20)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), 5).float())
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_pieces_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(workers: int) -> list[Tensor]:
        parameters = [nn.Parameter(torch.randn(12, 8, generator=stream(i, "p"))) for i in range(5)]
        for i, p in enumerate(parameters):
            p.grad = torch.randn(12, 8, generator=stream(i, "g"))
        muon(parameters, workers).step(0.1)
        return parameters

    at_once = run(1)
    monkeypatch.setattr("shoestring.training.muon.PIECE_ELEMENTS", 200)
    for workers in (1, 3):
        assert all(torch.equal(a, b) for a, b in zip(at_once, run(workers), strict=True))


def drawn_network() -> MicroDiT:
    model = MicroDiT(
        TransformerConfig(
            in_channels=3,
            caption_dim=7,
            dim=32,
            depth=3,
            head_dim=16,
            ffn_multiple_of=1,
            mixer=MixerConfig(depth=0),
            experts=ExpertsConfig(count=3),
        )
    )
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=stream(0, "drawn", i)))
    return model


def updated(
    mesh: DeviceMesh | None, place: Callable[[nn.Parameter], Shard] | None = None
) -> dict[str, Tensor]:
    """Weights, moments and averages after four steps, of which the third is found infinite."""
    model = drawn_network()
    if mesh is not None:
        fully_shard(model, mesh=mesh, shard_placement_fn=place)
    optimizers = Optimizers(model, OptimizerConfig(kind="muon", weight_decay=0.1), Workers(1))
    averages = Averages(model, (0.1,))
    optimizers.set_lr(0.01)
    for step, found in enumerate([0.0, 0.0, 1.0, 0.0], start=1):
        for i, p in enumerate(model.parameters()):
            gradient = torch.randn(p.shape, generator=stream(step, "drawn", i))
            gradient = gradient * float("nan") if found else gradient
            if isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
            p.grad = gradient
        optimizers.step(torch.tensor(found))
        averages.update(0.9, 8 * step, 8)
    result = {name: whole(p.detach()) for name, p in model.named_parameters()}
    result |= {name: whole(t) for name, t in (optimizers.tensors() | averages.tensors()).items()}
    with averages.applied("power-0.1"):
        return result | {f"used.{name}": whole(p.detach()).clone() for name, p in model.named_parameters()}


def differences() -> list[str]:
    """Of a network that lies on the ranks from one that does not, in each way it may lie."""
    dist.init_process_group("gloo")
    row = init_device_mesh("cpu", (2,))
    groups, copies = (init_device_mesh("cpu", s, mesh_dim_names=("r", "s")) for s in ((1, 2), (2, 1)))

    def ours(p: nn.Parameter) -> Shard:
        return Shard(shard_dimension(tuple(p.shape), 2))

    def last(p: nn.Parameter) -> Shard:
        return Shard(0 if p.shape[-1] % 2 else p.ndim - 1)

    alone = updated(None)
    orthogonal = {name for name in alone if f"{name}.momentum_buffer" in alone}
    found = [f"{len(orthogonal)} matrices"]
    for kind, mesh, place in (
        ("first", row, lambda _: Shard(0)),  # also uneven: three experts, 85 rows
        ("last", row, last),
        ("ours", row, ours),
        ("hybrid", groups, ours),
        ("copies", copies, ours),
    ):
        shared = updated(mesh, place)
        assert shared.keys() == alone.keys()
        for name in alone:
            apart = float((shared[name].double() - alone[name].double()).abs().max())
            exact = any(name.removesuffix(".momentum_buffer").endswith(each) for each in orthogonal)
            # AdamW's kernel rounds the last elements of an array otherwise than those before.
            if not apart <= (0 if exact else 1e-6):
                found.append(f"{kind}: {name} differs by {apart}")
        found.append(kind)
    dist.destroy_process_group()
    return found


def test_on_two_ranks_the_bits_are_those_of_one() -> None:
    """Every rank puts its part of the gradients by hand: the same numbers as one rank alone."""
    expected = ["23 matrices", "first", "last", "ours", "hybrid", "copies"]
    assert run_ranks(2, "test_muon:differences") == [expected, expected]
