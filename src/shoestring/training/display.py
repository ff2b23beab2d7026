"""What a person sees while a run trains, and what is written down: live line, log.jsonl, trackers."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from shoestring.config import LoggingConfig
from shoestring.runtime import UserError, say, write_text
from shoestring.training.trackers import open_trackers

PLAIN_INTERVAL_S = 15.0
"""Without a terminal a line is printed this often."""


def duration(seconds: float | None) -> str:
    """Seconds for a person: ``4.2 s``, ``42 s``, ``7 min 05 s``, ``3 h 12 min``; nothing for ``None``."""
    if seconds is None:
        return ""
    s = round(seconds)
    if s < 60:
        return f"{seconds:.2g} s" if s < 10 else f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86_400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86_400} d {s % 86_400 // 3600:02d} h"


def status_line(row: dict[str, Any], total_nimg: int, left_s: float) -> str:
    """One line: stage, progress, loss, rate, share of the machine's peak, time left, money."""
    share = row.get("peak_share")
    peak = "" if share is None else f" ({share:.0%} of peak)"
    money = f"  ${row['cost_usd']:.2f}" if row["cost_usd"] else ""
    return (
        f"{row['stage']}  {row['nimg']:,}/{total_nimg:,} images  loss {row['loss']:.4f}  "
        f"{row['images_per_s']:.1f} images/s{peak}  {duration(left_s)} left{money}"
    )


class LiveLine:
    """A line that is redrawn in a terminal, and printed now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = (
            Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        )
        self._printed_s = 0.0

    def __enter__(self) -> LiveLine:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, line: str) -> None:
        """Redraw, or print if the last line is old enough."""
        if self.live is not None:
            self.live.update(Text(line))
        elif time.monotonic() - self._printed_s > PLAIN_INTERVAL_S:
            self._printed_s = time.monotonic()
            say(self.console, line)


class RunLog:
    """``log.jsonl``, and the trackers that the settings ask for.

    After an interruption the log is cut back to the checkpoint that training goes on from: whatever was
    written after the last line of that checkpoint or before it. Roll-backs within a run stay in the log;
    :func:`rows_of` leaves out what they undid.

    Args:
        folder: run folder.
        nimg: images seen at the start.
        logging: which trackers to write to.

    Raises:
        UserError: if a tracker is wanted that is not installed or cannot start, or the disk is full.
    """

    def __init__(self, folder: Path, nimg: int, logging: LoggingConfig) -> None:
        self.trackers = open_trackers(folder, nimg, logging)
        path = folder / "log.jsonl"
        rows = read_log(folder)
        kept = max((i + 1 for i, row in enumerate(rows) if row["nimg"] <= nimg), default=0)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows[:kept]))
        self.file = path.open("a", buffering=1)

    def write(self, kind: str, row: Mapping[str, Any]) -> None:
        """Append a row; its numbers become curves over images seen, an event's text a note.

        Args:
            kind: ``train``, ``validation``, ``evaluation`` or ``event``.
            row: what to write; ``nimg`` must be among it, and ``what`` and ``text`` in an event.

        Raises:
            UserError: if the disk is full.
        """
        with self._disk():
            self.file.write(json.dumps({"kind": kind, **row}) + "\n")
            for tracker in self.trackers:
                tracker.row(kind, row)

    def picture(self, name: str, nimg: int, path: Path) -> None:
        """Show a picture in every tracker; without one nothing happens.

        Args:
            name: what it shows, such as ``samples``.
            nimg: images seen.
            path: PNG that is there.

        Raises:
            UserError: if the disk is full.
        """
        with self._disk():
            for tracker in self.trackers:
                tracker.picture(name, nimg, path)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self.file.name} ({error.strerror}); free some space and give the same "
                "command again: it goes on from the newest checkpoint"
            ) from error

    def close(self) -> None:
        """Flush and close; what cannot be flushed was reported when it was written."""
        with contextlib.suppress(OSError):
            self.file.close()
        for tracker in self.trackers:
            with contextlib.suppress(OSError):
                tracker.close()


def _row(line: str | bytes) -> dict[str, Any] | None:
    """A row of the log, or ``None`` for whatever else a crash left."""
    try:
        row = json.loads(line)
    except ValueError:  # not JSON, or not even text
        return None
    return row if isinstance(row, dict) and {"kind", "nimg"} <= row.keys() else None


class LogFollower:
    """Reads a log again and again: only what is new, or all of it after it was cut.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "log.jsonl"
        self._file, self._read_bytes = 0, 0
        self._rows: list[dict[str, Any]] = []

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far; a line that is being written is left for the next time."""
        try:
            with self._path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._file or stat.st_size < self._read_bytes:
                    self._file, self._read_bytes, self._rows = stat.st_ino, 0, []
                file.seek(self._read_bytes)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        whole = [line for line in lines if line.endswith(b"\n")]
        self._read_bytes += sum(map(len, whole))
        self._rows += [row for line in whole if (row := _row(line)) is not None]
        return self._rows


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All rows of a run's log; whatever else a crash left in the file is passed over."""
    path = folder / "log.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [row for line in lines if (row := _row(line)) is not None]


def rows_of(log: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """Rows of one kind by images seen, without those that a roll-back or a resume undid.

    Args:
        log: rows as they were written.
        kind: ``train``, ``validation`` or ``evaluation``.

    Returns:
        Rows whose ``nimg`` grows; of two at the same ``nimg`` the later one.
    """
    kept: dict[str, list[Mapping[str, Any]]] = {"train": [], "validation": [], "evaluation": []}
    for row in log:
        mine = kept.get(row["kind"])
        if mine is None and row.get("what") != "rolled-back":
            continue
        for rows in kept.values():
            while rows and rows[-1]["nimg"] > row["nimg"]:
                rows.pop()
        if mine is not None:
            if mine and mine[-1]["nimg"] == row["nimg"]:
                mine.pop()
            mine.append(row)
    return kept[kind]


class Rate:
    """Images per second and mean loss since the last log line, and time spent training in all.

    Args:
        before_s: time spent in earlier sittings.
    """

    def __init__(self, before_s: float) -> None:
        self._before_s = before_s
        self._start_s = self._since_s = time.perf_counter()
        self._idle_s = 0.0
        self.reset()

    def reset(self) -> None:
        """Begin a new stretch."""
        self._since_s, self._idle_s = time.perf_counter(), 0.0
        self._images, self._steps, self._loss = 0, 0, 0.0

    def step(self, images: int, loss: float) -> None:
        """Count one step."""
        self._images += images
        self._steps += 1
        self._loss += loss

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count against the rate, but does count as time spent."""
        start_s = time.perf_counter()
        yield
        self._idle_s += time.perf_counter() - start_s

    @property
    def loss(self) -> float:
        """Mean loss of the stretch."""
        return self._loss / max(1, self._steps)

    @property
    def images_per_s(self) -> float:
        """Rate of the stretch."""
        return self._images / max(1e-9, self.stretch_s)

    @property
    def stretch_s(self) -> float:
        """Seconds of the stretch, without those beside the steps."""
        return time.perf_counter() - self._since_s - self._idle_s

    @property
    def elapsed_s(self) -> float:
        """Seconds of this and all earlier sittings."""
        return self._before_s + time.perf_counter() - self._start_s
