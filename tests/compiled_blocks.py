"""What tests/test_compile.py runs in processes of their own: shape checks of the tests cannot be compiled."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from shoestring.config import ExpertsConfig, MixerConfig, TokensConfig, TransformerConfig
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning
from shoestring.models.microdit import MicroDiT
from shoestring.models.moe import ExpertChoice
from shoestring.runtime import Workers
from shoestring.tensors import visible_from_noise
from shoestring.training import compiling
from shoestring.training.compiling import compile_blocks
from shoestring.training.step_shapes import StepShape

GRID = (4, 4)
MODEL = TransformerConfig(
    in_channels=3,
    caption_dim=8,
    dim=32,
    depth=3,
    head_dim=16,
    qkv_multipliers=(1.0,),
    ffn_multipliers=(1.0,),
    ffn_multiple_of=16,
    mixer=MixerConfig(depth=1, dim=48),
    experts=ExpertsConfig(count=4),
    mask_captions=True,
)


def network(**changes: object) -> MicroDiT:
    net = MicroDiT(MODEL.model_copy(update=changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


def forward(net: MicroDiT, images: int, ratio: float, captions: int, low: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, 3, 8, 8, generator=generator)
    text = torch.randn(images, captions, 8, generator=generator)
    visible = visible_from_noise(torch.rand(images, 16, generator=generator), ratio)
    level = EDMProcess(0.5).level_at(torch.full((images,), 0.7))
    denoiser = EDMProcess(0.5).denoiser(net, torch.bfloat16 if low else torch.float32)
    condition = Conditioning(text, torch.ones(images, captions, dtype=torch.bool))
    return denoiser(x, level, condition, visible).x0_BKG.square().mean()


def gradients(net: MicroDiT, *shape: object, **low: bool) -> list[Tensor]:
    values = torch.autograd.grad(forward(net, *shape, **low), list(net.parameters()))
    return [value.detach().clone() for value in values]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True) if b.any())


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def counted() -> None:
    """As many graphs as announced, none for evaluation, and an error in place of one too many."""
    net = network()
    plain = gradients(net, 2, 0.5, 8)
    most = compile_blocks(net, TokensConfig(), [StepShape(2, GRID, ratio, 8) for ratio in (0.0, 0.5)])
    # The mixer always sees all patches; blocks 0 and 2 are built alike, block 1 has experts: two graphs.
    assert most == 1 + 2 + 2 * 2, most
    for _ in range(2):
        for ratio in (0.0, 0.5):
            gradients(net, 2, ratio, 8)
        with torch.no_grad():
            forward(net, 5, 0.25, 11)
        assert graphs() == most, graphs()
    assert difference(gradients(net, 2, 0.5, 8), plain) < 1e-5
    try:
        gradients(net, 3, 0.5, 8)
    except FailOnRecompileLimitHit:
        pass
    else:
        raise AssertionError("a shape that was not announced ran uncompiled")
    assert graphs() == most


def checkpointed() -> None:
    """Recomputed, in low precision and by two threads."""
    net = network(checkpoint_activations=True)
    plain = gradients(net, 2, 0.5, 8, low=True)
    most = compile_blocks(net, TokensConfig(), [StepShape(2, GRID, 0.5, 8)])
    gradients(net, 2, 0.5, 8, low=True)
    assert graphs() == most, graphs()
    with Workers(2) as workers:
        for _ in range(2):
            both = workers.map(lambda _: gradients(net, 2, 0.5, 8, low=True), [0, 1])
    assert graphs() == most, graphs()
    for values in both:
        assert difference(values, plain) < 0.02


def sharded() -> None:
    """Under FSDP2, with the router in a group of its own."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    net = network()
    forward(net, 2, 0.5, 8).backward()
    plain = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    most = compile_blocks(net, TokensConfig(), [StepShape(2, GRID, 0.5, 8)])
    for block in net.all_blocks():
        for module in block.modules():
            if isinstance(module, ExpertChoice):
                fully_shard(module.gate, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for _ in range(2):
        net.zero_grad()
        forward(net, 2, 0.5, 8).backward()
    assert graphs() == most, graphs()
    assert difference([p.grad.full_tensor() for p in net.parameters()], plain) < 1e-5
    dist.destroy_process_group()


def generated() -> None:
    """By torch's own code generator."""
    compiling.BACKEND = "inductor"
    net = network(depth=1, mixer=MixerConfig(depth=0), experts=ExpertsConfig(count=0))
    plain = gradients(net, 2, 0.5, 8, low=True)
    assert compile_blocks(net, TokensConfig(), [StepShape(2, GRID, 0.5, 8)]) == 1
    assert difference(gradients(net, 2, 0.5, 8, low=True), plain) < 0.03
    assert graphs() == 1


if __name__ == "__main__":
    compiling.BACKEND = "aot_eager"  # graphs are the same, and there a second earlier
    globals()[sys.argv[1]]()
