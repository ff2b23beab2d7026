"""Prompts with yes-or-no questions, as DPG-Bench and the Davidsonian scene graph have, and who answers them.

A question that depends on others counts as answered no where one of those is: whether the dog is brown has no
meaning where there is no dog. The score of a picture is the share of its questions that are answered yes.

Files are either those of DPG-Bench (CSV, a row a question: ``item_id``, ``text``, ``proposition_id``,
``dependency``, ``category_broad``, ``question_natural_language``), or JSON lines of our own, one a prompt:
``{"prompt": "...", "questions": [{"question": "...", "category": "...", "needs": [0]}]}``, where ``needs``
are the numbers of other questions of the prompt, from 0.

Source: Cho et al., arXiv 2310.18235, section 3 (the graph and its rule); Hu et al., arXiv 2403.05135,
section 4 (DPG-Bench).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shoestring.data.oracle import satisfies
from shoestring.encoders.captions import ImageToText
from shoestring.runtime import UserError
from shoestring.sampling.generate import to_pil
from shoestring.tensors import UInt8

JudgeName = Literal["vlm", "shapes"]
VLM = "HuggingFaceTB/SmolVLM-500M-Instruct"
"""The usual judge; any image-to-text model of transformers that chats can take its place."""
ASK = "{question} Answer with yes or no only."
Judge = Callable[[UInt8[Tensor, "3 H W"], str], bool]
"""Whether the answer to a question about a picture is yes."""


@dataclass(frozen=True)
class Question:
    """A question to be answered with yes or no."""

    text: str
    category: str
    needs: tuple[int, ...] = ()
    """Numbers of other questions of the same prompt without which it has no meaning."""


@dataclass(frozen=True)
class Questioned:
    """A prompt with its questions."""

    text: str
    questions: tuple[Question, ...]


def heeded(questions: Sequence[Question], answers: Sequence[bool]) -> list[bool]:
    """Answers after the rule: no, where a question that it depends on has no.

    Questions are gone through in order, and the rule looks at answers as they are by then: one that depends
    on a later question sees that one's own answer.

    Args:
        questions: of a prompt.
        answers: one each.

    Returns:
        One each.
    """
    found = list(answers)
    for place, question in enumerate(questions):
        found[place] = found[place] and all(found[i] for i in question.needs)
    return found


@dataclass(frozen=True)
class QuestionScore:
    """How well pictures answer to their prompts."""

    overall: float
    """Mean over pictures of the share of questions that are answered yes."""
    categories: Mapping[str, float]
    """Share of yes among the questions of a category, over all pictures, before the rule, as released."""


def score_questions(judged: Sequence[tuple[Questioned, Sequence[bool]]]) -> QuestionScore:
    """The score of many pictures.

    Args:
        judged: the prompt of each picture, and the answers as they were given.

    Returns:
        The score.
    """
    shares, by_category = [], dict[str, list[bool]]()
    for prompt, answers in judged:
        found = heeded(prompt.questions, answers)
        shares.append(sum(found) / len(found))
        for question, answer in zip(prompt.questions, answers, strict=True):
            by_category.setdefault(question.category, []).append(answer)
    categories = {name: sum(found) / len(found) for name, found in sorted(by_category.items())}
    return QuestionScore(sum(shares) / len(shares), categories)


# -- files -------------------------------------------------------------------------------------------------


def read_questions(path: Path) -> tuple[Questioned, ...]:
    """Read prompts with their questions.

    Args:
        path: CSV of DPG-Bench or JSON lines, see the top of this file.

    Returns:
        The prompts in order.

    Raises:
        UserError: naming the line that does not fit.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read questions from {path} ({error})") from error
    found = _dpg(path, lines) if path.suffix == ".csv" else _own(path, lines)
    if not found:
        raise UserError(f"{path} holds no prompt")
    return tuple(found)


def _own(path: Path, lines: Sequence[str]) -> list[Questioned]:
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with _line(path, number):
            row = json.loads(line)
            asked = row["questions"]
            if not asked:
                raise ValueError("questions is empty; a prompt needs one or more")
            questions = []
            for place, each in enumerate(asked):
                category, needs = str(each.get("category", "all")), each.get("needs", ())
                questions.append(_question(place, len(asked), str(each["question"]), category, needs))
            prompts.append(Questioned(str(row["prompt"]), tuple(questions)))
    return prompts


def _dpg(path: Path, lines: Sequence[str]) -> list[Questioned]:
    """Rows of one prompt have one ``item_id``; a dependency on 0 is none."""
    reader = csv.DictReader(lines)
    items: dict[str, list[tuple[int, Mapping[str, str]]]] = {}
    for row in reader:
        with _line(path, reader.line_num):
            items.setdefault(row["item_id"], []).append((reader.line_num, row))
    prompts = []
    for rows in items.values():
        with _line(path, rows[0][0]):
            places = {row["proposition_id"].strip(): place for place, (_, row) in enumerate(rows)}
        questions = []
        for place, (line, fields) in enumerate(rows):
            with _line(path, line):
                named = [each.strip() for each in fields["dependency"].split(",")]
                needs = [places.get(each, each) for each in named if each not in {"", "0"}]
                category = fields["category_broad"].strip() or "other"
                text = fields["question_natural_language"]
                questions.append(_question(place, len(rows), text, category, needs))
        prompts.append(Questioned(rows[0][1]["text"], tuple(questions)))
    return prompts


def _question(place: int, count: int, text: str, category: str, needs: Sequence[Any]) -> Question:
    if any(not isinstance(each, int) or each == place or not 0 <= each < count for each in needs):
        raise ValueError(f"question {place} needs {list(needs)}; it must be others of the same prompt")
    return Question(text, category, tuple(needs))


@contextmanager
def _line(path: Path, number: int) -> Iterator[None]:
    """Whatever does not fit becomes a sentence with the place."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}, line {number}: {reason}") from error


# -- judges ------------------------------------------------------------------------------------------------


class LanguageModelJudge:
    """Any image-to-text model of transformers that is asked, and answers with yes or no."""

    def __init__(self, place: str | None, device: torch.device) -> None:
        """Load the model.

        Args:
            place: folder or hub name; ``None`` = the usual one.
            device: where to run.

        Raises:
            UserError: if package or weights are missing, or the model cannot be asked.
        """
        place = place or VLM
        self._model = ImageToText(place, device, max_tokens=4, field="extractors.judge")
        self.digest = self._model.origin
        if not self._model.chats:
            raise UserError(
                f"extractors.judge is {place}, which writes captions and cannot be asked; choose a model "
                f"that chats, such as {VLM}"
            )

    def __call__(self, picture: UInt8[Tensor, "3 H W"], question: str) -> bool:
        """Ask, and see :func:`says_yes`."""
        (answer,) = self._model([to_pil(picture)], ASK.format(question=question))
        return says_yes(answer)


def says_yes(answer: str) -> bool:
    """Whether a model's words mean yes: they begin with it."""
    return answer.strip().lower().startswith("yes")


def _oracle(place: str | None, device: torch.device) -> Judge:
    """Questions are captions of the ``shapes`` world, and the picture is read by a program."""
    return lambda picture, question: satisfies(picture, question).all


JUDGES: Mapping[JudgeName, Callable[[str | None, torch.device], Judge]] = {
    "vlm": LanguageModelJudge,
    "shapes": _oracle,
}
"""Who answers. Another judge is a row here and a name in ``JudgeName``."""
