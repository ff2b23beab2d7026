"""What a person sees while a run trains, and what is written down: live line, log.jsonl, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from shoestring.runtime import UserError, say, write_text

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
    peak = "" if row["peak_share"] is None else f" ({row['peak_share']:.0%} of peak)"
    return (
        f"{row['stage']}  {row['nimg']:,}/{total_nimg:,} images  loss {row['loss']:.4f}  "
        f"{row['images_per_s']:.1f} images/s{peak}  {duration(left_s)} left  ${row['cost_usd']:.2f}"
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
    """``log.jsonl`` and, where installed and wanted, TensorBoard.

    After an interruption the log is cut back to the checkpoint that training goes on from.

    Args:
        folder: run folder.
        nimg: images seen at the start; later rows of an earlier try are dropped.
        tensorboard: write TensorBoard files too, if the package is there.
    """

    def __init__(self, folder: Path, nimg: int, tensorboard: bool) -> None:
        path = folder / "log.jsonl"
        kept = [row for row in read_log(folder) if row["nimg"] <= nimg]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = path.open("a", buffering=1)
        self.board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=nimg + 1)

    def write(self, kind: str, row: dict[str, Any]) -> None:
        """Append a row; its numbers become TensorBoard curves over images seen.

        Args:
            kind: ``train`` or ``validation``.
            row: what to write; ``nimg`` must be among it.

        Raises:
            UserError: if the disk is full.
        """
        try:
            self.file.write(json.dumps({"kind": kind} | row) + "\n")
            for key, value in row.items() if self.board is not None else ():
                if isinstance(value, int | float) and key != "nimg":
                    self.board.add_scalar(f"{kind}/{key}", value, row["nimg"])
        except OSError as error:
            raise UserError(
                f"cannot write {self.file.name} ({error.strerror}); free some space and give the same "
                "command again: it goes on from the newest checkpoint"
            ) from error

    def close(self) -> None:
        """Flush and close; what cannot be flushed was reported when it was written."""
        with contextlib.suppress(OSError):
            self.file.close()
        if self.board is not None:
            with contextlib.suppress(OSError):
                self.board.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All rows of a run's log; whatever else a crash left in the file is passed over."""
    rows = []
    path = folder / "log.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and {"kind", "nimg"} <= row.keys():
            rows.append(row)
    return rows


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
        return self._images / max(1e-9, time.perf_counter() - self._since_s - self._idle_s)

    @property
    def elapsed_s(self) -> float:
        """Seconds of this and all earlier sittings."""
        return self._before_s + time.perf_counter() - self._start_s
