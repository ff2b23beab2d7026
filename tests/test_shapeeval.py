"""ShapeEval: ground truth is right, and pictures of other captions are so only by chance."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from shoestring.data.oracle import Seen, read
from shoestring.data.shapes import RELATIONS, Thing, combinations, place, render
from shoestring.evaluation.geneval import TASKS
from shoestring.evaluation.shapeeval import RULES, ShapePrompt, make_shape_prompts, shows

PER_TASK = int(os.environ.get("SHAPES_PER_TASK", "60"))


def scenes(per_task: int, seed: int) -> list[tuple[ShapePrompt, tuple[Thing, ...]]]:
    rng = np.random.default_rng(seed)
    prompts = make_shape_prompts(per_task, seed=seed)
    return [(prompt, place(prompt.asked, rng)) for prompt in prompts]


def drawn(things: tuple[Thing, ...]) -> Tensor:
    return torch.from_numpy(render(things, 32))


def test_ground_truth_is_right_and_others_are_right_by_chance() -> None:
    truth = scenes(PER_TASK, 0)
    for task in TASKS:
        right = [shows(drawn(things), prompt) for prompt, things in truth if prompt.task == task]
        assert np.mean(right) >= 0.995, task
    read_all = [read(drawn(things)) for _, things in truth]
    true_all = [tuple(Seen(t.shape, t.colour, t.x, t.y, t.size) for t in things) for _, things in truth]
    for task in TASKS:
        rule = RULES[task]
        prompts = [prompt for prompt, _ in truth if prompt.task == task]
        pairs = [(p, k) for p in prompts[:20] for k, (other, _) in enumerate(truth) if other.text != p.text]
        by_chance = np.mean([rule(true_all[k], prompt.asked) for prompt, k in pairs])
        judged = np.mean([rule(read_all[k], prompt.asked) for prompt, k in pairs])
        assert judged <= by_chance + 0.01, task


def test_prompts_of_all_tasks_are_trained_and_drawn_again_alike() -> None:
    prompts = make_shape_prompts(12)
    assert [prompt.task for prompt in prompts] == [task for task in TASKS for _ in range(12)]
    assert make_shape_prompts(12) == prompts
    assert make_shape_prompts(12, seed=1) != prompts
    trained, _ = combinations(0.1)
    assert {(group.shape, group.colour) for p in prompts for group in p.asked.groups} <= set(trained)
    assert {p.asked.relation for p in prompts if p.task == "position"} == set(RELATIONS)
    assert {p.asked.groups[0].count for p in prompts if p.task == "counting"} == {2, 3, 4}


def seen(*things: str, x: float = 0.5) -> tuple[Seen, ...]:
    return tuple(Seen(*reversed(thing.split()), x + 0.3 * i, 0.5, 0.3) for i, thing in enumerate(things))


RED, BOTH = "a red circle", "a red circle and a blue square"
CASES = [
    ("single_object", RED, seen("blue circle"), True),
    ("single_object", RED, seen("red square"), False),
    ("colors", RED, seen("red circle", "blue heart"), True),
    ("colors", RED, seen("blue circle", "red heart"), False),
    ("two_object", BOTH, seen("blue circle", "red square"), True),
    ("two_object", BOTH, seen("red circle", "blue circle"), False),
    ("color_attr", BOTH, seen("red circle", "blue square"), True),
    ("color_attr", BOTH, seen("blue circle", "red square"), False),
    ("counting", "two red circles", seen("red circle", "blue circle", "red heart"), True),
    ("counting", "two red circles", seen("red circle", "red circle", "red circle"), False),
    ("position", "a red circle left of a blue square", seen("red circle", "blue square"), True),
    ("position", "a red circle left of a blue square", seen("blue square", "red circle"), False),
    ("position", "a red circle left of a blue square", seen("red circle"), False),
]


@pytest.mark.parametrize(("task", "caption", "things", "right"), CASES)
def test_rules(task: str, caption: str, things: tuple[Seen, ...], right: bool) -> None:
    from shoestring.data.shapes import parse_caption

    assert RULES[task](things, parse_caption(caption)) == right


def test_every_task_has_right_and_wrong_cases() -> None:
    assert {(task, right) for task, _, _, right in CASES} == {(t, r) for t in TASKS for r in (True, False)}
