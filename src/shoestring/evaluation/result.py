"""The result of an evaluation: its figures, and everything that they depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoestring.evaluation.measures import Figure
from shoestring.evaluation.protocol import Protocol, differences
from shoestring.runtime import UserError

PARTS = ("extractors", "reference", "floor", "loss", "retrieval")
"""Facts that only some metrics leave."""
NOT_COMPARED = (
    *("name", "weights", "micro_batch", "metrics", "bootstrap"),
    *("sampling", "prompts_file", "count", "most_prompts", "extractors", "reference_files"),
)
"""Settings of no consequence to a figure, or whose consequence is among the facts."""


@dataclass
class Result:
    """A finished evaluation."""

    protocol: Protocol
    facts: dict[str, Any]
    """What figures depend on beside the model: sampling, counts, prompts, reference, extractors."""
    model: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Of every picture, higher is better; by them the page shows the best and the worst."""
    nearest: list[int] = field(default_factory=list)
    """Number of the training picture nearest to each."""
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Points of plots: precision over recall, loss over noise."""
    made: dict[str, Any] = field(default_factory=dict)
    """When, where, how long, and with which versions."""

    def as_json(self) -> str:
        """All of it."""
        rows = {
            "protocol": self.protocol.model_dump(mode="json"),
            "facts": self.facts,
            "model": self.model,
            "figures": {
                name: {k: v for k, v in asdict(f).items() if v is not None}
                for name, f in self.figures.items()
            },
            "warnings": self.warnings,
            "scores": self.scores,
            "nearest": self.nearest,
            "curves": self.curves,
            "made": self.made,
        }
        return json.dumps(rows, indent=1) + "\n"


def markdown(result: Result) -> str:
    """The result as a row of a table, with its head."""
    names = list(result.figures)
    cells = [in_words(result.figures[name]) for name in names]
    about = f"{result.model['name']}, {result.model['images_seen']:,} images"
    head = f"| model | protocol | N | {' | '.join(names)} |\n|{'---|' * (len(names) + 3)}\n"
    return (
        f"{head}| {about} | {result.protocol.name} | {result.facts['pictures']:,} | {' | '.join(cells)} |\n"
    )


def in_words(figure: Figure) -> str:
    """The value, with its interval where there is one."""
    text = f"{figure.value:.4g}"
    return text if figure.low95 is None else f"{text} [{figure.low95:.4g}, {figure.high95:.4g}]"


def read_result(path: Path) -> dict[str, Any]:
    """A finished result.

    Args:
        path: ``result.json``, or its folder.

    Returns:
        What it says.

    Raises:
        UserError: if there is none.
    """
    file = path / "result.json" if path.is_dir() else path
    try:
        found: Any = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no result of shoestring eval ({error})") from error
    if not isinstance(found, dict) or not {"protocol", "facts", "figures"} <= found.keys():
        raise UserError(f"{file} is no result of shoestring eval: it lacks protocol, facts or figures")
    return dict(found)


def compared(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Two results side by side, and first of all whether they may be compared.

    Args:
        one: a result.
        other: another.

    Returns:
        Lines for a person.
    """
    facts, others = ({k: v for k, v in each["facts"].items() if k not in PARTS} for each in (one, other))
    found = differences(facts, others)
    for part in PARTS:  # of networks and references that both have
        a, b = (each["facts"].get(part, {}) for each in (one, other))
        both = a.keys() & b.keys()
        found += differences({k: a[k] for k in both}, {k: b[k] for k in both}, f"{part}.")
    mine, theirs = (
        {k: v for k, v in each["protocol"].items() if k not in NOT_COMPARED} for each in (one, other)
    )
    found += differences(mine, theirs)
    same = "Comparable: sampling, prompts, reference, extractors and protocol are the same"
    lines = ["Not comparable: " + "; ".join(found) if found else same]
    for name in one["figures"]:
        if name in other["figures"]:
            values = [f"{result['figures'][name]['value']:.4g}" for result in (one, other)]
            lines.append(f"{name}: {values[0]} and {values[1]}")
    return lines
