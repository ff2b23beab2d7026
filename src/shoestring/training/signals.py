"""What a run is asked to do from outside: Ctrl-C, SIGTERM and SIGUSR1, on any of its processes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console

from shoestring.runtime import say
from shoestring.training.parallel import Parallel

SAVE, STOP = 1, 2


def hold_saves() -> None:
    """Keep SIGUSR1 waiting until :class:`Signals` can heed it; it would end a process that is starting."""
    if hasattr(signal, "SIGUSR1"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def heed_saves() -> None:
    """The opposite of :func:`hold_saves`; one that came meanwhile comes now."""
    if hasattr(signal, "SIGUSR1"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


@dataclass(frozen=True)
class Asked:
    """What is to be done after this step; the same on all ranks."""

    save: bool
    stop: bool


class Signals:
    """Ctrl-C and SIGTERM save and end the run after the current step, Ctrl-C after that ends it at once.

    A second SIGTERM changes nothing: schedulers send it to all processes of a run, and launchers pass theirs
    on, so that it comes twice. SIGUSR1 saves, and the run goes on: some send it before they take a machine
    away.

    Args:
        parallel: a signal to one rank is one to all.
        console: where a person reads.
    """

    def __init__(self, parallel: Parallel, console: Console) -> None:
        self.parallel, self.console = parallel, console
        self._save_wanted = self._stop_wanted = False
        self._before: dict[signal.Signals, Any] = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stop_wanted:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._stop_wanted = True
        say(self.console, "Stopping after this step and saving; Ctrl-C stops at once.")

    def _save(self, number: int, frame: FrameType | None) -> None:
        self._save_wanted = True

    def agreed(self) -> Asked:
        """What any rank was asked since the last time; all ranks must ask together."""
        save = self._save_wanted
        if save:
            self._save_wanted = False  # before the ranks talk: what comes meanwhile counts the next time
        wanted = self.parallel.largest(STOP if self._stop_wanted else SAVE if save else 0)
        return Asked(save=wanted >= SAVE, stop=wanted >= STOP)

    def __enter__(self) -> Signals:
        handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = {
            signal.SIGINT: self._stop,
            signal.SIGTERM: self._stop,
        }
        if hasattr(signal, "SIGUSR1"):
            handlers[signal.SIGUSR1] = self._save
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        heed_saves()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
