"""Every operation of a forward and a backward pass, timed and counted by the part of the network.

Forward, the part is that of the innermost module that runs. What is computed is marked with it in the
autograd graph, so that each operation of the backward pass belongs to the part whose gradient it takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

from shoestring.models.layers import CrossAttention, SelfAttention, TransformerBlock
from shoestring.models.moe import ExpertChoice

LOSS, EXPERTS = "noise and loss", "experts"
MARK = "shoestring-part"
EXPERT_PRODUCTS = {"bmm", "gelu", "gelu_backward"}
EXPERT_ROUTER = {"mm", "_softmax", "_softmax_backward_data", "topk", "scatter"}
FUSED_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (0, 2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 4),
}
"""Fused attention on a CPU, which torch does not count: place of the queries, and products needed."""


@dataclass
class PartTime:
    """What one part of a step costs; of one step."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    flops: float = 0.0
    """In matrix products, forward and backward, as they are executed."""

    @property
    def seconds(self) -> float:
        """Both passes."""
        return self.forward_s + self.backward_s


@dataclass
class Ledger:
    """Who is running, and what it has cost so far."""

    device: torch.device
    running: list[str] = field(default_factory=list)
    parts: dict[str, PartTime] = field(default_factory=dict)

    def enter(self, part: str) -> Callable[..., None]:
        """A hook before a module of that part."""

        def hook(*_: object) -> None:
            self.running.append(part)

        return hook

    def leave(self, *_: object) -> None:
        """The hook after a module."""
        self.running.pop()

    def part(self, name: str) -> PartTime:
        """What a part has cost."""
        return self.parts.setdefault(name, PartTime())

    def clock(self) -> float:
        """Seconds, when the device has done all it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Operations(TorchDispatchMode):
    """Times and counts every operation."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        ledger, kwargs = self.ledger, kwargs or {}
        start_s = ledger.clock()
        result = function(*args, **kwargs)
        elapsed_s = ledger.clock() - start_s
        node: Any = torch._C._current_autograd_node()
        if ledger.running:  # also a block that is computed once more for its gradient
            name = ledger.running[-1]
        else:
            name = LOSS if node is None else node.metadata.get(MARK, LOSS)
        part = ledger.part(_expert_part(function, args, node is None) if name == EXPERTS else name)
        if node is None:
            part.forward_s += elapsed_s
        else:
            part.backward_s += elapsed_s
        part.flops += _flops(function, args, kwargs, result)
        return result


def _expert_part(function: Any, args: tuple[Any, ...], forward: bool) -> str:
    """Router, products, or moving tokens to experts and back."""
    name = function._schema.name.removeprefix("aten::")
    # Weights become low on the way forward and their gradients float32 on the way back; the router's tokens
    # do the opposite.
    cast = name == "_to_copy" and args[0].ndim == 3
    weights = cast and (args[0].dtype == torch.float32) == forward
    if name in EXPERT_PRODUCTS or weights:
        return f"{EXPERTS}: products"
    return f"{EXPERTS}: router" if name in EXPERT_ROUTER or cast else f"{EXPERTS}: moving tokens"


def _flops(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> float:
    packet = function._overloadpacket
    if packet in FUSED_CPU:
        first, products = FUSED_CPU[packet]
        q, k, v = (args[first + i].shape for i in range(3))
        return float(sdpa_flop_count(q, k, v)) / 2 * products
    counter = flop_registry.get(packet)
    return 0.0 if counter is None else float(counter(*args, **kwargs, out_val=result))


class _Marks(TorchFunctionMode):
    """Writes the running part into the autograd graph of whatever is computed."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        part = self.ledger.running[-1] if self.ledger.running else LOSS
        for value in tree_leaves(result):
            # Where a gradient is not wanted, grad_fn is None; asking for it goes through here again.
            if isinstance(value, Tensor):
                with torch._C.DisableTorchFunctionSubclass():
                    _mark(value.grad_fn, part)
        return result


def _mark(node: Any, part: str) -> None:
    """Mark a node and those before it that have no mark yet: one call may make several."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is not None and MARK not in node.metadata:
            node.metadata[MARK] = part
            waiting.extend(before for before, _ in node.next_functions)


def _part_of(name: str, module: nn.Module) -> str | None:
    """The part that a module is; ``None``: that of the module around it."""
    where = {"patch_mixer": "mixer", "blocks": "backbone"}.get(name.split(".")[0])
    if isinstance(module, ExpertChoice):
        return EXPERTS
    if where is not None:
        leaf = name.split(".")[2:]
        if isinstance(module, TransformerBlock):
            return f"{where}: modulation, norms"
        if isinstance(module, SelfAttention):
            return f"{where}: self-attention"
        if isinstance(module, CrossAttention) or leaf == ["cross_attn", "kv_linear"]:
            return f"{where}: cross-attention"
        return f"{where}: feed-forward" if leaf == ["mlp"] else None
    words = name.split(".")
    stack = {"down_blocks": "down", "mid_block": "middle", "up_blocks": "up"}.get(
        words[min(1, len(words) - 1)]
    )
    if words[0] == "unet" and stack is not None:
        return {"resnets": f"{stack}: convolutions", "attentions": f"{stack}: attention"}.get(words[-2])
    whole = {
        "": "embedding",
        "unet.conv_out": "head",
        "y_embedder": "captions",
        "y_emb_preprocess": "captions",
        "pooled_y_emb_process": "captions",
        "patch_mixer_map_y": "captions",
        "patch_mixer_map_xin": "mixer: maps",
        "patch_mixer_map_xout": "mixer: maps",
        "routing": "token method",
        "decoder_layer": "decoder",
        "final_layer": "head",
    }
    return "decoder" if isinstance(module, TransformerBlock) else whole.get(name)


@contextmanager
def watched(network: nn.Module, ledger: Ledger) -> Iterator[None]:
    """Inside the block every operation is timed and put down to its part.

    Args:
        network: its blocks must not be compiled.
        ledger: what is added to.

    Yields:
        None: the ledger is the result.
    """
    handles: list[RemovableHandle] = []
    for name, module in network.named_modules():
        part = _part_of(name, module)
        if part is not None:
            handles.append(module.register_forward_pre_hook(ledger.enter(part)))
            handles.append(module.register_forward_hook(ledger.leave, always_call=True))
    try:
        with ExitStack() as stack:
            stack.enter_context(_Marks(ledger))
            stack.enter_context(_Operations(ledger))
            yield
    finally:
        for handle in handles:
            handle.remove()
