"""ShapeEval: the six tasks of GenEval in the world of shapes, judged by its exact reader, without a network.

As in GenEval, what else is in a picture does not matter, except where things are counted. A caption of the
shapes always names colours; the tasks ``single_object``, ``two_object`` and ``counting`` do not look at them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from shoestring.data.oracle import Seen, judge, read
from shoestring.data.shapes import RELATIONS, Group, Requirement, combinations
from shoestring.evaluation.geneval import TASKS
from shoestring.runtime import stream_seed
from shoestring.tensors import UInt8


@dataclass(frozen=True)
class ShapePrompt:
    """A caption, and the task by which a picture of it is judged."""

    task: str
    asked: Requirement

    @property
    def text(self) -> str:
        """The caption."""
        return str(self.asked)


def _has(seen: Sequence[Seen], group: Group) -> bool:
    return any((each.shape, each.colour) == (group.shape, group.colour) for each in seen)


def _shapes(seen: Sequence[Seen], asked: Requirement) -> bool:
    return {group.shape for group in asked.groups} <= {each.shape for each in seen}


def _count(seen: Sequence[Seen], asked: Requirement) -> bool:
    (group,) = asked.groups
    return sum(each.shape == group.shape for each in seen) == group.count


def _coloured(seen: Sequence[Seen], asked: Requirement) -> bool:
    return all(_has(seen, group) for group in asked.groups)


def _placed(seen: Sequence[Seen], asked: Requirement) -> bool:
    return judge(tuple(seen), asked).relation is True


RULES: dict[str, Callable[[Sequence[Seen], Requirement], bool]] = {
    "single_object": _shapes,
    "two_object": _shapes,
    "counting": _count,
    "colors": _coloured,
    "position": _placed,
    "color_attr": _coloured,
}


def shows(picture: UInt8[Tensor, "3 H W"], prompt: ShapePrompt) -> bool:
    """Whether a picture shows what its prompt asks for, by the rule of its task.

    Args:
        picture: square, 24 pixels or more.
        prompt: what was asked for.

    Returns:
        The verdict.
    """
    return RULES[prompt.task](read(picture), prompt.asked)


def make_shape_prompts(per_task: int = 50, held_out: float = 0.1, seed: int = 0) -> tuple[ShapePrompt, ...]:
    """Prompts of the six tasks from the pairs of shape and colour that are trained.

    Args:
        per_task: prompts of a task; a caption may come twice where the world is too small.
        held_out: share of pairs that are not, as in ``data.held_out``.
        seed: of the draws.

    Returns:
        Task by task.
    """
    draw = np.random.default_rng(stream_seed(seed, "shapeeval"))
    trained, _ = combinations(held_out)

    def group(count: int = 1) -> Group:
        shape, colour = trained[draw.integers(len(trained))]
        return Group(count, shape, colour)

    def two() -> tuple[Group, Group]:
        """Of different shapes and colours, so that nothing can be taken for the other."""
        while True:
            a, b = group(), group()
            if a.shape != b.shape and a.colour != b.colour:
                return a, b

    makers: dict[str, Callable[[int], Requirement]] = {
        "single_object": lambda _: Requirement((group(),)),
        "two_object": lambda _: Requirement(two()),
        "counting": lambda k: Requirement((group(2 + k % 3),)),
        "colors": lambda _: Requirement((group(),)),
        "position": lambda k: Requirement(two(), relation=RELATIONS[k % len(RELATIONS)]),
        "color_attr": lambda _: Requirement(two()),
    }
    return tuple(ShapePrompt(task, makers[task](k)) for task in TASKS for k in range(per_task))
