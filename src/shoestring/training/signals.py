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
STALL_S = 5.0
"""A wait for data that has lasted so long may last for ever: what is asked meanwhile is done at once."""


class StopWaiting(BaseException):
    """Raised in a wait for data when the run is asked to save or to stop."""


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
        waited_s: seconds that the run has been waiting for data, 0 while it is not. Where that takes long,
            ``StopWaiting`` is raised there; the wait may be begun again.
    """

    def __init__(self, parallel: Parallel, console: Console, waited_s: Callable[[], float]) -> None:
        self.parallel, self.console, self.waited_s = parallel, console, waited_s
        self._save_wanted = self._stop_wanted = False
        self._before: dict[signal.Signals, Any] = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stop_wanted:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._stop_wanted = True
        say(self.console, "Stopping after this step and saving; Ctrl-C stops at once.")
        self._leave_stall(number, frame)

    def _save(self, number: int, frame: FrameType | None) -> None:
        self._save_wanted = True
        self._leave_stall(number, frame)

    def _leave_stall(self, number: int, frame: FrameType | None) -> None:
        """End a long wait for data, now or when it has become long."""
        waited_s = self.waited_s()
        if waited_s > STALL_S:
            raise StopWaiting
        if waited_s > 0 and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, STALL_S)

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
            handlers[signal.SIGALRM] = self._leave_stall
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        heed_saves()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
