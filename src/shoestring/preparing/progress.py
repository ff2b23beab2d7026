"""What a person sees of a long job on data: one line with rate, time left and money so far."""

from __future__ import annotations

import time

from rich.console import Console

from shoestring.data.jobs import Progress
from shoestring.training.display import LiveLine, duration

QUIET_S = 2.0
"""A job that is done by then shows no line."""


class JobLine:
    """A line that is redrawn.

    Args:
        console: where a person reads.
        usd_per_hour: price of all machines together; 0 shows no money.
    """

    def __init__(self, console: Console, usd_per_hour: float = 0.0) -> None:
        self._line, self._usd_per_hour = LiveLine(console), usd_per_hour
        self._began_s = time.monotonic()

    def __enter__(self) -> JobLine:
        self._line.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._line.__exit__(None, None, None)

    def show(self, progress: Progress) -> None:
        """How far a job is that counts what it does."""
        left_s = (progress.total - progress.done) / progress.rate if progress.rate else None
        self._show(f"{progress.stage}  {progress.done:,}/{progress.total:,}", progress.rate, left_s)

    def items(self, done: int, kept: int, total: int | None) -> None:
        """How far ingestion is."""
        rate = done / max(1e-9, time.monotonic() - self._began_s)
        of = "" if total is None else f"/{total:,}"
        left_s = None if total is None else (total - done) / max(rate, 1e-9)
        self._show(f"{done:,}{of} pictures read, {kept:,} kept", rate, left_s)

    def bytes(self, done: int, total: int) -> None:
        """How far a check of files is."""
        rate = done / max(1e-9, time.monotonic() - self._began_s) / 1e6
        self._show(f"{done / 1e6:,.0f}/{total / 1e6:,.0f} MB", rate, (total - done) / max(rate * 1e6, 1e-9))

    def _show(self, text: str, rate: float, left_s: float | None) -> None:
        if time.monotonic() - self._began_s < QUIET_S:
            return
        left = "" if left_s is None else f"  {duration(left_s)} left"
        spent = (time.monotonic() - self._began_s) / 3600 * self._usd_per_hour
        self._line.show(f"{text}  {rate:,.1f}/s{left}" + (f"  ${spent:.2f}" if self._usd_per_hour else ""))
