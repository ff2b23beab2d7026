"""Compiling the blocks of a network: whole graphs, as many as there are shapes, none after the first steps.

A compiled block is one graph for each set of shapes it is called with. Blocks of equal build share their
graphs; under layer-wise scaling each width has its own. A graph too many, which by default of torch would
mean silently running on uncompiled, ends the run instead: something that should be fixed moves.

Only passes that take gradients are compiled (:meth:`TransformerBlock.forward`). Validation and sampling have
other batch sizes and caption lengths, and run as they are beside it. Compiled is what is inside a block;
activation checkpointing and FSDP2's gathering of weights stay around it, so that neither breaks the graph.
FSDP2 also gathers the router of experts by itself, in float32: blocks with experts are two graphs, and the
router stands between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from shoestring.config import TokensConfig
from shoestring.models.layers import TransformerBlock
from shoestring.models.moe import ExpertChoice
from shoestring.models.transformer import DiffusionTransformer
from shoestring.training.step_shapes import StepShape, trace_shapes

BACKEND = "inductor"


def compile_blocks(network: DiffusionTransformer, tokens: TokensConfig, shapes: Sequence[StepShape]) -> int:
    """Have every block of mixer, backbone and decoder compiled when it first meets a shape.

    Args:
        network: changed in place; weights and their names stay. Before FSDP2, DDP or anything else wraps it.
        tokens: its token method.
        shapes: of all steps to come. Called again with others, blocks are compiled anew.

    Returns:
        The most graphs that there will be. One more raises torch's ``FailOnRecompileLimitHit``.
    """
    seen = trace_shapes(network.config, tokens, shapes).blocks
    alike: dict[tuple[Any, ...], list[str]] = {}
    blocks = {name: part for name, part in network.named_modules() if isinstance(part, TransformerBlock)}
    for name, block in blocks.items():
        alike.setdefault(_build(block), []).append(name)
    total = 0
    for names in alike.values():
        limit = len(set().union(*(seen.get(name, ()) for name in names)))
        if not limit:
            continue  # no step runs them (a path that is left out)
        compiled, graphs = _compiled(blocks[names[0]], limit)
        total += graphs
        for name in names:
            blocks[name].compiled = compiled
    _allow_graphs(total)
    return total


def _compiled(block: TransformerBlock, limit: int) -> tuple[Callable[..., Tensor], int]:
    """What computes blocks of this build, and its most graphs for so many shapes.

    It is made of methods of the class, so that a copy of a block calls it with its own weights.
    """
    if not isinstance(block.mlp, ExpertChoice):
        return _whole_graph(type(block).compute, limit), limit
    first, last = _whole_graph(type(block).before_mlp, limit), _whole_graph(_experts, limit)

    def compute(block: TransformerBlock, *inputs: Any) -> Tensor:
        x_BLD, hidden_BLD, gate_BD = first(block, *inputs)
        assert isinstance(block.mlp, ExpertChoice)
        return last(block, x_BLD, hidden_BLD, gate_BD, block.mlp.logits(hidden_BLD))

    return compute, 2 * limit


def _experts(
    block: TransformerBlock, x_BLD: Tensor, hidden_BLD: Tensor, gate_BD: Tensor, logits_BLE: Tensor
) -> Tensor:
    """The rest of a block with experts."""
    return x_BLD + gate_BD[:, None] * block.mlp(hidden_BLD, logits_BLE)


def _whole_graph(function: Callable[..., Any], limit: int) -> Callable[..., Any]:
    """A function compiled as one graph a shape.

    Torch keeps the graphs of a function with its code object, in a list that a hit reorders: threads that
    look it up at the same time can miss. So each build of blocks has a copy of the code, and a short list.
    """
    assert isinstance(function, FunctionType)
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(own, fullgraph=True, dynamic=False, backend=BACKEND, recompile_limit=limit)  # type: ignore[call-overload]


def _build(block: TransformerBlock) -> tuple[Any, ...]:
    """What two blocks must have in common to share graphs."""
    weights = tuple((name, tuple(value.shape), value.dtype) for name, value in block.named_parameters())
    return type(block), block.attn.head_dim, block.attn.qk_norm, weights


def _allow_graphs(count: int) -> None:
    """Torch also limits how often lines are compiled in a whole process, over all networks in it."""
    config = torch._dynamo.config
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 0) + count
