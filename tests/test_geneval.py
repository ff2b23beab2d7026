"""GenEval: each rule by hand-made detections, the prompts, the files and the score."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from shoestring.evaluation.geneval import (
    CLASSES,
    COLOURS,
    MOST,
    RELATIONS,
    SIZES,
    TASKS,
    Detection,
    Prompt,
    Wanted,
    judge,
    make_prompts,
    plural,
    read_prompts,
    relations,
    score,
    with_article,
    write_prompts,
)
from shoestring.runtime import UserError


def at(x: float, y: float, size: float = 10.0, name: str = "cup", score: float = 0.95, mask: object = None):
    """An object around a place; the mask carries its colour."""
    half = size / 2
    return Detection(name, score, (x - half, y - half, x + half, y + half), mask)


def painted(objects: Sequence[Detection]) -> list[str]:
    return [str(each.mask) for each in objects]


ONE = Prompt("single_object", "a photo of a cup", (Wanted("cup", 1),))
TWO = Prompt("two_object", "a photo of a cup and a dog", (Wanted("cup", 1), Wanted("dog", 1)))
THREE = Prompt("counting", "a photo of three cups", (Wanted("cup", 3),), (Wanted("cup", 4),))
RED = Prompt("colors", "a photo of a red cup", (Wanted("cup", 1, "red"),))
LEFT = Prompt(
    "position", "a photo of a dog left of a cup", (Wanted("cup", 1), Wanted("dog", 1, None, "left of"))
)
BOTH = Prompt(
    "color_attr", "a photo of a red cup and a blue dog", (Wanted("cup", 1, "red"), Wanted("dog", 1, "blue"))
)
CUP, DOG = at(50, 50), at(10, 50, name="dog")

RULES = [
    # rule, prompt, detections, right?
    ("an object that is there", ONE, [CUP], True),
    ("nothing is there", ONE, [], False),
    ("another object is there", ONE, [DOG], False),
    ("others beside it do not matter", ONE, [CUP, DOG], True),
    ("more of it does not matter where one is asked for", ONE, [CUP, CUP], True),
    ("a score above 0.3 counts", ONE, [at(0, 0, score=0.31)], True),
    ("a score of 0.3 does not", ONE, [at(0, 0, score=0.3)], False),
    ("both objects are there", TWO, [CUP, DOG], True),
    ("one of two is missing", TWO, [CUP], False),
    ("exactly as many as asked for", THREE, [CUP] * 3, True),
    ("too few", THREE, [CUP] * 2, False),
    ("too many", THREE, [CUP] * 4, False),
    ("counted are those with a score above 0.9", THREE, [CUP] * 3 + [at(0, 0, score=0.9)], True),
    ("unsure ones do not make up the number", THREE, [CUP] * 2 + [at(0, 0, score=0.9)], False),
    ("the right colour", RED, [at(0, 0, mask="red")], True),
    ("a wrong colour", RED, [at(0, 0, mask="blue")], False),
    ("the surest object's colour is asked for", RED, [at(0, 0, mask="red"), at(0, 0, 10, score=0.5)], True),
    (
        "another one's colour does not help",
        RED,
        [at(0, 0, mask="blue"), at(9, 9, 10, "cup", 0.5, "red")],
        False,
    ),
    ("in the right place", LEFT, [CUP, DOG], True),
    ("on the wrong side", LEFT, [at(10, 50), at(50, 50, name="dog")], False),
    ("one above the other is not beside", LEFT, [at(50, 50), at(50, 10, name="dog")], False),
    ("at the same place is nowhere", LEFT, [CUP, at(50, 50, name="dog")], False),
    ("no object to lie beside", LEFT, [DOG], False),
    ("both colours are right", BOTH, [at(0, 0, mask="red"), at(9, 9, name="dog", mask="blue")], True),
    ("colours are mixed up", BOTH, [at(0, 0, mask="blue"), at(9, 9, name="dog", mask="red")], False),
]


@pytest.mark.parametrize(("rule", "prompt", "detections", "right"), RULES, ids=[rule[0] for rule in RULES])
def test_rules(rule: str, prompt: Prompt, detections: list[Detection], right: bool) -> None:
    verdict, reasons = judge(prompt, detections, painted)
    assert verdict == right
    assert bool(reasons) != right


def test_all_six_tasks_have_rules() -> None:
    assert {prompt.task for _, prompt, _, _ in RULES} == set(TASKS)


@pytest.mark.parametrize(
    ("dx", "dy", "held"),
    [
        (-40, 0, {"left of"}),
        (40, 0, {"right of"}),
        (0, -40, {"above"}),
        (0, 40, {"below"}),
        (-40, -40, {"left of", "above"}),  # 0.707 along both, less the margins
        (-40, -15, {"left of"}),  # 13 of 43 along y
        (-2, 0, set()),  # within a tenth of both sizes
        (-2.1, 0, set()),  # beyond, but the rest is 0.1 of 2.1
        (-4.1, 0, {"left of"}),  # 2.1 of 4.1
        (-3.9, 0, set()),  # 1.9 of 3.9
        (0, 0, set()),
    ],
)
def test_relations(dx: float, dy: float, held: set[str]) -> None:
    assert relations(at(50 + dx, 50 + dy), at(50, 50)) == held


def test_large_objects_must_be_further_apart() -> None:
    assert relations(at(40, 50, 10), at(50, 50, 10)) == {"left of"}
    assert relations(at(40, 50, 40), at(50, 50, 40)) == set()


def test_only_the_surest_sixteen_are_looked_at() -> None:
    many = [at(i, 0, score=0.91 + i / 1000) for i in range(20)]
    prompt = Prompt("counting", "x", (Wanted("cup", 4),), (Wanted("cup", MOST + 1),))
    assert judge(prompt, many, painted)[0]


def test_reasons_say_what_was_found() -> None:
    assert judge(THREE, [CUP] * 4, painted)[1] == ("expected cup < 4, found 4",)
    assert judge(RED, [at(0, 0, mask="blue")], painted)[1] == ("expected red cup >= 1, found blue",)
    assert judge(LEFT, [DOG], painted)[1] == (
        "expected cup >= 1, found 0",
        "no target for dog to be left of",
    )


# -- prompts -----------------------------------------------------------------------------------------------


def test_our_prompts_are_those_of_the_six_tasks() -> None:
    prompts = make_prompts()
    assert len(prompts) == 553
    assert Counter(prompt.task for prompt in prompts) == SIZES
    assert len({prompt.text for prompt in prompts}) == 553
    assert make_prompts() == prompts
    assert make_prompts(1) != prompts
    singles = [prompt for prompt in prompts if prompt.task == "single_object"]
    assert {prompt.include[0].name for prompt in singles} == set(CLASSES)
    for prompt in prompts:
        assert prompt.text.startswith("a photo of ")
        for wanted in prompt.include:
            named = plural(wanted.name) if wanted.count > 1 else wanted.name
            assert named in prompt.text
            assert wanted.colour is None or wanted.colour in COLOURS
            assert wanted.colour is None or f"{wanted.colour} {wanted.name}" in prompt.text
    placed = [prompt for prompt in prompts if prompt.task == "position"]
    assert Counter(prompt.include[1].relation for prompt in placed) == dict.fromkeys(RELATIONS, 25)
    for prompt in placed:
        target, thing = prompt.include
        words = f"{with_article(thing.name)} {thing.relation} {with_article(target.name)}"
        assert prompt.text == f"a photo of {words}"
    counted = [prompt for prompt in prompts if prompt.task == "counting"]
    assert all(p.exclude == (Wanted(p.include[0].name, p.include[0].count + 1),) for p in counted)


def test_articles_and_plurals() -> None:
    assert (with_article("apple"), with_article("cup")) == ("an apple", "a cup")
    pairs = {"bus": "buses", "bench": "benches", "knife": "knives", "sheep": "sheep", "skis": "skis"}
    pairs |= {"computer mouse": "computer mice", "toothbrush": "toothbrushes", "teddy bear": "teddy bears"}
    pairs |= {"wine glass": "wine glasses", "toy": "toys", "person": "people", "scissors": "scissors"}
    assert {name: plural(name) for name in pairs} == pairs


def test_a_file_is_read_as_it_was_written_and_as_the_original_writes_it(tmp_path: Path) -> None:
    write_prompts(tmp_path / "own.jsonl", make_prompts())
    assert read_prompts(tmp_path / "own.jsonl") == make_prompts()
    original = (
        '{"tag": "position", "include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1, '
        '"position": ["left of", 0]}], "prompt": "a photo of a dog left of a cup"}'
    )
    (tmp_path / "original.jsonl").write_text(original + "\n")
    assert read_prompts(tmp_path / "original.jsonl") == (LEFT,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tag": "shape"}, "line 1: tag is 'shape'; it must be one of single_object"),
        ({"prompt": None}, "line 1: 'prompt' is missing"),
        ({"include": [{"class": "unicorn", "count": 1}]}, "class is 'unicorn'"),
        ({"include": [{"class": "cup", "count": 1, "color": "mauve"}]}, "color is 'mauve'"),
        ({"include": [{"class": "cup", "count": 1, "position": ["near", 0]}]}, "position is"),
        ({"include": [{"class": "cup", "count": 1, "position": ["above", 0]}]}, "number of an object before"),
        ({"include": 3}, "line 1:"),
    ],
)
def test_wrong_prompts_are_named(change: dict, said: str, tmp_path: Path) -> None:
    row = {"tag": "colors", "include": [{"class": "cup", "count": 1}], "prompt": "a photo of a cup"} | change
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({key: value for key, value in row.items() if value is not None}))
    with pytest.raises(UserError, match=said):
        read_prompts(path)


def test_files_without_prompts(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="cannot read prompts"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "text.jsonl").write_text("a photo of a cup")
    with pytest.raises(UserError, match="line 1:"):
        read_prompts(tmp_path / "text.jsonl")


# -- the score ---------------------------------------------------------------------------------------------


def test_the_score_is_the_mean_over_tasks() -> None:
    found = score([(ONE, True)] * 3 + [(ONE, False)] + [(RED, True), (RED, False)])
    assert found.tasks == {"single_object": 0.75, "colors": 0.5}
    assert found.overall == 0.625
    low, high = found.intervals95["colors"]  # one prompt, however many pictures
    assert low < 0.1
    assert high > 0.9
    with pytest.raises(ValueError, match="no judged pictures"):
        score([])
