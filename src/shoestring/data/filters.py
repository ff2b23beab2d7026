"""What ingestion keeps: thresholds and limits, in a fixed order, each with a short name for counting."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoestring.data.captions import plain
from shoestring.data.duplicates import Looks, look, short_digest
from shoestring.data.folder import NO_CAPTION, UNUSABLE
from shoestring.data.pixels import Unusable, decode
from shoestring.data.records import Picture, Rejection
from shoestring.runtime import UserError

CAPTION_ONLY = "caption: "
"""Begins the kind of what is said of one caption of a picture that was kept."""
OPERATORS = {"<=": operator.le, ">=": operator.ge}
ON_COMMAND_LINE = {
    "min_side": "--min-side",
    "max_aspect": "--max-aspect",
    "min_caption": "--min-caption",
    "max_caption": "--max-caption",
    "thresholds": "--where",
    "equal_files": "--drop-equal",
    "look_alikes": "--drop-similar",
}
"""How users give the filters."""


@dataclass(frozen=True)
class Threshold:
    """A limit on a number that the source has for each picture."""

    column: str
    sign: str
    """``<=`` or ``>=``."""
    limit: float

    @staticmethod
    def parse(text: str) -> Threshold:
        """Read a threshold.

        Args:
            text: like ``aesthetic>=5`` or ``nsfw<=0.2``.

        Returns:
            The threshold.

        Raises:
            UserError: if it is not written like that.
        """
        found = re.fullmatch(r"\s*(.+?)\s*(<=|>=)\s*([-+.\deE]+)\s*", text)
        try:
            assert found is not None
            return Threshold(found[1], found[2], float(found[3]))
        except (AssertionError, ValueError):
            raise UserError(
                f"--where is {text!r}; write COLUMN>=NUMBER or COLUMN<=NUMBER, such as 'aesthetic>=5'"
            ) from None

    def __str__(self) -> str:
        return f"{self.column}{self.sign}{self.limit:g}"

    def judge(self, picture: Picture) -> Rejection | None:
        """Why a picture is left out, or ``None``."""
        value = picture.columns.get(self.column)
        if value is None:
            return Rejection(picture.id, f"{self.column} is missing or no number", f"{self.column} missing")
        if OPERATORS[self.sign](value, self.limit):
            return None
        return Rejection(picture.id, f"{self.column} is {value:g}", f"not {self}")


@dataclass(frozen=True)
class Filters:
    """What is kept.

    The order: captions, thresholds, equal ids, unusable pictures, equal files, sides, aspect, look-alikes.
    """

    min_side: int | None = None
    """Pixels of the shorter side."""
    max_aspect: float | None = None
    """Longer side by shorter side; 8 is a limit in any case."""
    min_caption: int | None = None
    """Characters. Of several captions those that fit are kept, and the picture if there is one."""
    max_caption: int | None = None
    thresholds: tuple[Threshold, ...] = ()
    equal_files: bool = False
    """Leave out a file that is, byte for byte, that of an earlier picture that was kept."""
    look_alikes: int | None = None
    """Leave out a picture whose look differs from an earlier one's in at most so many of 63 bits
    (:func:`shoestring.data.duplicates.look`)."""

    def __post_init__(self) -> None:
        if self.look_alikes is not None:
            Looks(self.look_alikes)  # says what is wrong with it before anything is written
        if (self.max_caption or math.inf) < (self.min_caption or 0):
            raise UserError(
                f"--min-caption is {self.min_caption} and --max-caption is {self.max_caption}, which no "
                "caption fits; leave one of them out or change it"
            )

    @property
    def numbers(self) -> tuple[str, ...]:
        """Columns that a reader has to deliver."""
        return tuple(dict.fromkeys(threshold.column for threshold in self.thresholds))

    def to_json(self) -> dict[str, Any]:
        """Those that are set, as plain values, by their names on the command line."""
        given = {ON_COMMAND_LINE[name]: value for name, value in vars(self).items() if value is not None}
        given["--where"] = [str(threshold) for threshold in self.thresholds]
        return {name: value for name, value in given.items() if value not in ([], False)}

    def captions(self, picture: Picture) -> tuple[list[str], list[Rejection]]:
        """The captions that fit, each on one line, and why the others do not.

        Args:
            picture: with captions as they are.

        Returns:
            Both; without any caption that fits, the last of the reasons is the picture's own.
        """
        kept, rejected = [], []
        for number, caption in enumerate(map(plain, picture.captions), start=1):
            fault = self._fault(caption)
            if fault is None:
                kept.append(caption)
            else:
                item = f"{picture.id} caption {number}"
                rejected.append(Rejection(item, _length(caption), f"{CAPTION_ONLY}{fault}"))
        if kept:
            return kept, rejected
        if not rejected:
            return [], [Rejection(picture.id, "no caption", NO_CAPTION)]
        *_, last = rejected
        reason = last.reason if len(rejected) == 1 else f"none of {len(rejected)} fits: {last.reason}"
        return [], [Rejection(picture.id, reason, last.kind.removeprefix(CAPTION_ONLY))]

    def _fault(self, caption: str) -> str | None:
        if not caption:
            return NO_CAPTION
        if self.min_caption is not None and len(caption) < self.min_caption:
            return "caption too short"
        if self.max_caption is not None and len(caption) > self.max_caption:
            return "caption too long"
        return None

    def threshold(self, picture: Picture) -> Rejection | None:
        """Why a picture is left out by one of the thresholds, or ``None``."""
        reasons = (threshold.judge(picture) for threshold in self.thresholds)
        return next((reason for reason in reasons if reason is not None), None)

    def size(self, name: str, width: int, height: int) -> Rejection | None:
        """Why a picture of this size is left out, or ``None``.

        Args:
            name: of the picture.
            width: in pixels.
            height: in pixels.

        Returns:
            The reason.
        """
        short, long = sorted((width, height))
        shown = f"{width} x {height} pixels"
        if self.min_side is not None and short < self.min_side:
            return Rejection(name, shown, "too small")
        if self.max_aspect is not None and long > self.max_aspect * short:
            return Rejection(name, shown, "too long")
        return None


def _length(caption: str) -> str:
    return f"{len(caption)} characters" if caption else "empty caption"


@dataclass(frozen=True)
class Examined:
    """What the file of a picture shows."""

    digest: bytes
    width: int
    """As seen, after orientation marks."""
    height: int
    look: tuple[int, bytes] | None


def examine(data: bytes, with_look: bool) -> Examined | Rejection:
    """Decode a picture to see that it can be.

    Args:
        data: the file.
        with_look: whether the look is wanted.

    Returns:
        What it shows, or why it is unusable.
    """
    try:
        picture = decode(data)
    except Unusable as reason:
        return Rejection("", str(reason), UNUSABLE)
    seen = look(picture) if with_look else None
    return Examined(short_digest(data), picture.width, picture.height, seen)


def summary(rejected: Mapping[str, int]) -> str:
    """Counts by reason in words, the most frequent first."""
    pairs = sorted(rejected.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count:,} {kind}" for kind, count in pairs) or "none"
