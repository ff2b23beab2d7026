"""What a run tells: sentences for whoever reads, rows and pictures for its log."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from shoestring.config import LoggingConfig
from shoestring.runtime import say
from shoestring.training.display import RunLog
from shoestring.training.saving import UnlessFull


class Record:
    """The first rank writes; the others are silent, except about what they alone have seen.

    Args:
        console: where a person reads; silent on all ranks but the first.
        rank: of this process.
        nimg: images seen so far.
    """

    def __init__(self, console: Console, rank: int, nimg: Callable[[], int]) -> None:
        self.console, self.rank, self.nimg = console, rank, nimg
        self.unless_full = UnlessFull(partial(say, console))
        self._log: RunLog | None = None

    def open(self, folder: Path, logging: LoggingConfig) -> None:
        """Begin to write into the run folder.

        Args:
            folder: of the run; rows of an earlier try beyond the present place are cut off.
            logging: trackers.
        """
        self._log = RunLog(folder, self.nimg(), logging)

    def row(self, kind: str, row: dict[str, Any]) -> None:
        """Write a row.

        Args:
            kind: ``train``, ``validation``, ``evaluation`` or ``event``.
            row: without the images seen.
        """
        if self._log is not None:
            with self.unless_full():
                self._log.write(kind, {"nimg": self.nimg(), **row})

    def event(self, what: str, text: str) -> None:
        """Say something that matters, and write it down.

        Args:
            what: its kind.
            text: a sentence.
        """
        say(self.console, text)
        self.row("event", {"what": what, "text": text})

    def picture(self, name: str, path: Path) -> None:
        """Show a picture to the trackers.

        Args:
            name: what it shows.
            path: where it is.
        """
        if self._log is not None:
            self._log.picture(name, self.nimg(), path)

    def say_here(self, text: str) -> None:
        """Say what this process alone has seen."""
        if self.rank == 0:
            say(self.console, text)
        else:
            say(Console(stderr=True), f"rank {self.rank}: {text}")

    def close(self) -> None:
        """Flush and close."""
        if self._log is not None:
            self._log.close()
