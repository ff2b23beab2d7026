"""``shoestring watch``: a run as it stands, in a terminal; read from its folder, so it disturbs nobody."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shoestring.config import RunConfig
from shoestring.studies.page import dollars, finite, percent, short
from shoestring.studies.runs import Row, run_settings, state_of, works_now
from shoestring.training.display import LogFollower, duration, rows_of
from shoestring.training.folder import checkpoint_folders

INTERVAL_S = 2.0
"""Time between two looks."""
EVENTS = 6
SPARK, BAR = 24, 24
BARS = "▁▂▃▄▅▆▇█"
TREND = 5
"""A change compares the last fifth of the values with the fifth before it."""
STALE = 5
"""A log line is late after this many of its intervals."""


def sparkline(values: Sequence[float], width: int = SPARK) -> str:
    """Values as bars of eight heights, on a logarithmic scale where all are positive.

    Args:
        values: in order; those that are not finite are left out.
        width: characters at most; more values are averaged.

    Returns:
        One character a value or group of values; the lowest is the lowest bar.
    """
    values = [v for v in values if math.isfinite(v)]
    size = math.ceil(len(values) / width)
    means = [fmean(values[i : i + size]) for i in range(0, len(values), size)] if size else []
    if not means:
        return ""
    heights = [math.log(v) for v in means] if min(means) > 0 else means
    low, span = min(heights), max(heights) - min(heights)
    top = len(BARS) - 1
    return "".join(BARS[round((h - low) / span * top) if span else 0] for h in heights)


def change(values: Sequence[float]) -> float | None:
    """Relative change of the mean: the last fifth of the values against the fifth before it."""
    values = [v for v in values if math.isfinite(v)]
    n = max(1, len(values) // TREND)
    if len(values) < 2 * n:
        return None
    before, now = fmean(values[-2 * n : -n]), fmean(values[-n:])
    return now / before - 1 if before else None


def view(folder: Path, config: RunConfig, log: Sequence[Row]) -> RenderableType:
    """The run at this moment.

    Args:
        folder: run folder.
        config: its settings.
        log: rows of its log.

    Returns:
        What to show in a terminal of any width.
    """
    train, validation = rows_of(log, "train"), rows_of(log, "validation")
    last = train[-1] if train else None
    parts: list[RenderableType | None] = [
        _headline(folder, config, last),
        _stages(config, 0 if last is None else last["nimg"]),
    ]
    if last is None:
        parts.append(Text("no line in log.jsonl yet: the first comes after logging.log_nimg images"))
    else:
        parts.append(_figures(config, train))
        stage = [row for row in train if row.get("stage") == last.get("stage")]
        parts.append(_levels("training loss in this stage, by noise level", stage, "loss_per_bin"))
        parts.append(_levels("validation loss, by noise level", validation, "loss_per_level"))
        parts.append(_quality(rows_of(log, "evaluation")))
    parts.append(_events(log, train))
    parts.append(_files(folder))
    shown = [part for part in parts if part is not None]
    return Group(shown[0], *(spaced for part in shown[1:] for spaced in ("", part)))


def _quality(rows: Sequence[Row]) -> Text | None:
    """The newest kernel distance, and the one before."""
    if not rows:
        return None
    last = rows[-1]
    text = (
        f"KID of {last['pictures']} samples to {last['real_pictures']} real pictures: "
        f"{last['kid_efflite0']:.4g} after {last['nimg']:,} images"
    )
    if len(rows) > 1:
        text += f", {rows[-2]['kid_efflite0']:.4g} after {rows[-2]['nimg']:,}"
    return Text(text)


def _headline(folder: Path, config: RunConfig, last: Row | None) -> Text:
    working = works_now(folder)
    state = state_of(config, 0 if last is None else last["nimg"], working)
    style = {"training now": "bold green", "finished": "bold", "stopped": "bold yellow"}.get(state, "")
    line = Text.assemble((config.name, "bold"), "  ", str(folder), "  ", (state, style))
    if last is not None:
        age_s = _age_s(folder / "log.jsonl")
        expected_s = config.logging.log_nimg / max(last.get("images_per_s") or 0, 1e-9)
        late = working and age_s > max(60.0, STALE * expected_s)
        line.append(f", last line {duration(age_s)} ago", style="bold red" if late else "")
    return line


def _stages(config: RunConfig, nimg: int) -> Table:
    table = _table("stage", "", ">", "images", ">resolution", ">mask")
    start = 0
    for stage in config.stages:
        length = stage.steps * stage.batch
        done = min(max(nimg - start, 0), length)
        filled = BAR * done // length
        here = 0 < done < length or (done == 0 and nimg == start)
        end = stage.mask_ratio if stage.mask_ratio_end is None else stage.mask_ratio_end
        masks = dict.fromkeys(percent(ratio) for ratio in (stage.mask_ratio, end))
        table.add_row(
            Text(stage.name, style="bold" if here else ""),
            Text("█" * filled + "░" * (BAR - filled), style="green" if done == length else ""),
            f"{100 * done // length} %",
            f"{done:,} of {length:,}",
            str(stage.resolution),
            " to ".join(masks),
        )
        start += length
    return table


def _figures(config: RunConfig, train: Sequence[Row]) -> Table:
    last = train[-1]
    loss = [row["loss"] for row in train if row.get("stage") == last.get("stage") and finite(row.get("loss"))]
    rate, elapsed_s, cost = last.get("images_per_s"), last.get("elapsed_s"), last.get("cost_usd")
    left_s = max(0, config.nimg - last["nimg"]) / rate if rate else None
    hourly = config.logging.usd_per_hour
    total = cost + left_s / 3600 * hourly if left_s and cost else None
    skipped = sum(row.get("skipped") or 0 for row in train)
    memory = last.get("memory_bytes")
    load = last.get("expert_load") or {}
    facts = [
        ("loss", f"{loss[-1]:.4f} {_trend(loss)}" if loss else ""),
        ("", sparkline(loss)),
        ("images", f"{last['nimg']:,} of {config.nimg:,}"),
        ("rate", "" if rate is None else f"{short(rate)} images/s"),
        ("share of peak", percent(last.get("peak_share"))),
        ("time", duration(elapsed_s)),
        ("time left", f"about {duration(left_s)}" if left_s else ""),
        (
            "money",
            "" if not cost else dollars(cost) + ("" if total is None else f", {dollars(total)} in all"),
        ),
        ("learning rate", short(last.get("lr"))),
        ("mask", percent(last.get("mask_ratio"))),
        ("gradient norm", short(last.get("grad_norm"))),
        ("memory", "" if memory is None else f"{memory / 1e9:.2f} GB"),
        ("waiting for data", percent(last.get("data_wait_share"))),
        ("expert load", ", ".join(f"{key} {short(value)}" for key, value in load.items() if finite(value))),
        ("steps skipped", str(skipped) if skipped else ""),
    ]
    table = Table.grid(padding=(0, 2))
    shown = [(Text(name, style="dim"), text) for name, text in facts if text]
    half = math.ceil(len(shown) / 2)
    for i in range(half):
        right = shown[half + i] if half + i < len(shown) else ("", "")
        table.add_row(*shown[i], *right)
    return table


def _levels(title: str, rows: Sequence[Row], key: str) -> Table | None:
    """A line a noise level: its curve, its value, its change."""
    levels = sorted({level for row in rows for level in row.get(key) or {}}, key=float)
    if not levels:
        return None
    table = _table(">σ", title, ">now", ">change")
    for level in levels:
        values = [row[key][level] for row in rows if finite((row.get(key) or {}).get(level))]
        if values:
            table.add_row(f"{float(level):.3g}", sparkline(values), short(values[-1]), _trend(values))
    return table


def _trend(values: Sequence[float]) -> Text:
    moved = change(values)
    if moved is None:
        return Text("")
    return Text(f"{100 * moved:+.1f} %", style="green" if moved < 0 else "yellow")


def _events(log: Sequence[Row], train: Sequence[Row]) -> Table | None:
    events = [row for row in log if row["kind"] == "event"]
    if not events:
        return None
    table = _table(">images", "event", "")
    for row in events[-EVENTS:]:
        what = str(row.get("what", ""))
        style = "" if what == "saved" else "yellow"
        table.add_row(f"{row['nimg']:,}", Text(what, style=style), Text(str(row.get("text", ""))))
    if len(events) > EVENTS:
        table.add_row("", Text(f"the last {EVENTS} of {len(events)}", style="dim"))
    return table


def _files(folder: Path) -> Table | None:
    """Paths of the newest picture and checkpoint, with their age."""
    pictures = sorted((folder / "progress").glob("*.png"))
    newest = {"samples": pictures[-1:], "checkpoint": checkpoint_folders(folder)[-1:]}
    table = Table.grid(padding=(0, 2))
    for name, found in newest.items():
        for path in found:
            age = f"{duration(_age_s(path))} ago"
            table.add_row(Text(name, style="dim"), Text(str(path), overflow="fold"), age)
    return table if table.row_count else None


def _age_s(path: Path) -> float:
    """Seconds since a file was written; 0 if the clock was set back, or it was deleted just now."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return 0.0


def _table(*columns: str) -> Table:
    """A table without lines; columns that begin with ``>`` are aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left")
    return table


def watch(folder: Path, console: Console, once: bool = False) -> None:
    """Show a run until it is finished, or until Ctrl-C; without a terminal, or where it is finished, once.

    Args:
        folder: run folder.
        console: where a person reads.
        once: show it once and return.

    Raises:
        UserError: if it is not a run folder, or its settings cannot be read.
    """
    config, follower = run_settings(folder), LogFollower(folder)

    def over() -> bool:
        done = max((row["nimg"] for row in follower.rows()), default=0) >= config.nimg
        return done and not works_now(folder)

    if not once and console.is_terminal and not over():
        with (
            contextlib.suppress(KeyboardInterrupt),
            Live(console=console, auto_refresh=False, screen=True) as live,
        ):
            while not over():
                live.update(view(folder, config, follower.rows()), refresh=True)
                time.sleep(INTERVAL_S)
    console.print(view(folder, config, follower.rows()), highlight=False)
