"""Prompts with yes-or-no questions: the rule of dependencies, the two kinds of files, scores, judges."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shoestring.data.shapes import parse_caption, place, render
from shoestring.evaluation.questions import (
    JUDGES,
    LanguageModelJudge,
    Question,
    Questioned,
    heeded,
    read_questions,
    says_yes,
    score_questions,
)
from shoestring.runtime import UserError
from shoestring.sampling.generate import to_pil
from test_captioner import blip, llava

DOG = Questioned(
    "a brown dog on a red rug",
    (
        Question("Is there a dog?", "entity"),
        Question("Is the dog brown?", "attribute", (0,)),
        Question("Is there a rug?", "entity"),
        Question("Is the brown dog on the rug?", "relation", (1, 2)),
    ),
)
HEAD = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple"
HEAD += ",question_natural_language"
CSV = f"""{HEAD}
0,a brown dog on a red rug,dog,1,0,entity,whole,"entity - whole (dog)",Is there a dog?
0,a brown dog on a red rug,dog,2,1,attribute,color,"attribute (dog, brown)",Is the dog brown?
0,a brown dog on a red rug,dog,3,0,entity,whole,"entity - whole (rug)",Is there a rug?
0,a brown dog on a red rug,dog,4,"2, 3",relation,spatial,"relation (dog, rug)",Is the brown dog on the rug?
1,"a cat, asleep",cat,1,0,entity,whole,entity (cat),Is there a cat?
"""


@pytest.mark.parametrize(
    ("answers", "after"),
    [
        ([1, 1, 1, 1], [1, 1, 1, 1]),
        ([0, 1, 1, 1], [0, 0, 1, 0]),  # no dog: nothing of the dog, and so on down the graph
        ([1, 0, 1, 1], [1, 0, 1, 0]),
        ([1, 1, 0, 1], [1, 1, 0, 0]),
        ([1, 1, 1, 0], [1, 1, 1, 0]),
    ],
)
def test_a_question_without_its_grounds_is_answered_no(answers: list[int], after: list[int]) -> None:
    assert heeded(DOG.questions, [bool(a) for a in answers]) == [bool(a) for a in after]


def test_a_question_that_depends_on_a_later_one_sees_its_own_answer() -> None:
    questions = (Question("a", "x", (1,)), Question("b", "x", (2,)), Question("c", "x"))
    assert heeded(questions, [True, True, False]) == [True, False, False]


def test_scores_are_means_of_pictures_and_shares_of_categories() -> None:
    cat = Questioned("a cat", (Question("Is there a cat?", "entity"),))
    found = score_questions([(DOG, [True, False, True, True]), (cat, [False])])
    assert found.overall == pytest.approx((2 / 4 + 0) / 2)
    assert found.categories == {"attribute": 0, "entity": pytest.approx(2 / 3), "relation": 1}


def test_both_kinds_of_files(tmp_path: Path) -> None:
    dpg = tmp_path / "dpg_bench.csv"
    dpg.write_text(CSV)
    first, second = read_questions(dpg)
    assert first == DOG
    assert (second.text, second.questions) == ("a cat, asleep", (Question("Is there a cat?", "entity"),))
    own = tmp_path / "own.jsonl"
    questions = [
        {"question": q.text, "category": q.category, "needs": list(q.needs)} for q in first.questions
    ]
    own.write_text(json.dumps({"prompt": first.text, "questions": questions}) + "\n\n")
    assert read_questions(own) == (first,)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("q.jsonl", "{", "line 1: "),
        ("q.jsonl", '{"prompt": "a"}', "line 1: 'questions' is missing"),
        ("q.jsonl", '{"prompt": "a", "questions": []}', "questions is empty"),
        ("q.jsonl", '{"prompt": "a", "questions": [{"question": "b", "needs": [0]}]}', "must be others"),
        (
            "q.jsonl",
            '{"prompt": "a", "questions": [{"question": "b", "needs": [3]}]}',
            "question 0 needs [3]",
        ),
        ("q.jsonl", "\n", "holds no prompt"),
        ("q.csv", "item_id,text\n0,a\n", "line 2: 'proposition_id' is missing"),
        ("q.csv", CSV.replace("2, 3", "7"), "question 3 needs ['7']"),
    ],
)
def test_wrong_files_are_sentences(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        read_questions(tmp_path / name)
    assert said in str(caught.value)
    assert name in str(caught.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read questions"):
        read_questions(tmp_path / "none.csv")


def test_the_oracle_of_the_shapes_world_answers() -> None:
    judge = JUDGES["shapes"](None, torch.device("cpu"))
    things = place(parse_caption("a red circle"), np.random.default_rng(0))
    picture = torch.from_numpy(render(things, 32))
    assert judge(picture, "a red circle")
    assert not judge(picture, "a blue circle")


def test_what_counts_as_yes() -> None:
    answers = ["Yes.", " yes, it is", "No", "There is no yes", ""]
    assert [says_yes(answer) for answer in answers] == [True, True, False, False, False]


def test_a_language_model_is_asked(tmp_path: Path) -> None:
    judge = LanguageModelJudge(llava(tmp_path / "llava"), torch.device("cpu"))
    picture = torch.zeros(3, 40, 40, dtype=torch.uint8)
    (answer,) = judge._model([to_pil(picture)], "is there a dog Answer with yes or no only.")
    assert judge(picture, "is there a dog") == says_yes(answer)
    with pytest.raises(UserError, match=r"extractors.judge is .*, which writes captions and cannot be asked"):
        LanguageModelJudge(blip(tmp_path / "blip"), torch.device("cpu"))
