"""Several processes on one machine: ``shoestring train --nproc N``.

Each is the same command with the environment that ``torchrun`` would set. What torchrun does not do: a
mistake of the user ends all of them with one sentence instead of being tried again, and the number of
restarts is counted anew whenever the run has got further. Several machines: ``torchrun`` (docs/training.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from shoestring.config import RunConfig
from shoestring.runtime import ExitCode, UserError, say
from shoestring.training.folder import checkpoint_folders
from shoestring.training.parallel import check_batches
from shoestring.training.signals import heed_saves, hold_saves

FINAL = (0, ExitCode.MISTAKE, ExitCode.FAILED, ExitCode.INTERRUPTED)
"""Exit codes after which starting again would change nothing."""
LAUNCHER = "SHOESTRING_LAUNCHER"
"""Environment variable of the ranks: process number of their launcher."""
PATIENCE_S = 60.0
"""Ranks end together; whoever is left so long after the first is ended."""
GRACE_S = 5.0
"""A rank that crashes may have lost another one, which is about to say what is wrong."""
MAX_RESTARTS = 3
"""Starts in a row that reach no further checkpoint."""


def launched() -> bool:
    """Whether this process is one of several that somebody started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process is the one that talks."""
    return os.environ.get("RANK", "0") == "0"


def follow_launcher() -> None:
    """In a rank that :class:`Launcher` started: be asked to stop when the launcher is killed."""
    if LAUNCHER not in os.environ or sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != int(os.environ[LAUNCHER]):  # it was killed before
        sys.exit(ExitCode.INTERRUPTED)


class Launcher:
    """Starts the ranks, passes signals on, and starts again where one was lost.

    Args:
        words: arguments of ``shoestring`` that every rank is started with.
        ranks: how many.
        folder: run folder; newer checkpoints there are progress.
        console: where a person reads.
        pause_s: between two looks at the processes.
    """

    def __init__(
        self, words: Sequence[str], ranks: int, folder: Path, console: Console, pause_s: float = 0.1
    ) -> None:
        self.words, self.ranks, self.folder, self.console = list(words), ranks, folder, console
        self.pause_s = pause_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopping = False

    def run(self) -> int:
        """Run to the end.

        Returns:
            Exit code: 0 done, 130 interrupted, 2 a mistake of the user, 3 diverged, 1 lost again and again.
        """
        fruitless, before = 0, self._newest()
        with self._signals():
            while True:
                self._start()
                if self._stopping:  # asked while there was nobody to pass it on to
                    self._send(signal.SIGTERM)
                code, what = self._wait()
                if code in FINAL:
                    return code
                if self._stopping:
                    return ExitCode.INTERRUPTED
                now = self._newest()
                # Images at once can be halved a few times only, so that is no reason to give up.
                fruitless = 0 if now > before or code == ExitCode.NO_MEMORY else fruitless + 1
                before = now
                if fruitless > MAX_RESTARTS:
                    say(self.console, f"{what}; {MAX_RESTARTS} starts in a row reached no further checkpoint")
                    return ExitCode.LOST
                say(self.console, f"{what}; starting again from the last checkpoint")

    def _newest(self) -> int:
        return max((int(folder.name) for folder in checkpoint_folders(self.folder)), default=-1)

    def _start(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // self.ranks))
        shared = {
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": threads,
            LAUNCHER: str(os.getpid()),
            # DDP remarks at every start that it looks for unused parameters, which it is told to.
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        }
        command = [sys.executable, "-m", "shoestring.cli", *self.words]
        hold_saves()  # which the ranks inherit: SIGUSR1 would end them before they can heed it
        self._processes = [
            subprocess.Popen(  # noqa: S603 - our own command
                command,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                # Ctrl-C in a terminal would reach the ranks twice: by the terminal and by us.
                process_group=0,
            )
            for rank in range(self.ranks)
        ]
        heed_saves()

    def _wait(self) -> tuple[int, str]:
        """Until all have ended; the exit code that says why, and a sentence."""
        first: tuple[int, int] | None = None
        since = 0.0
        while True:
            codes = [process.poll() for process in self._processes]
            bad = [(rank, code) for rank, code in enumerate(codes) if code]
            told = next(((rank, code) for rank, code in bad if code in (*FINAL, ExitCode.NO_MEMORY)), None)
            if first is None and bad:
                first, since = bad[0], time.monotonic()
            if None not in codes:
                if first is None:
                    return 0, ""
                rank, code = told or first
                return code, _sentence(rank, code)
            if first is not None:
                clear = any(code < 0 or code == ExitCode.NO_MEMORY for _, code in bad)
                patience_s = 0.0 if clear else GRACE_S if told is None else PATIENCE_S
                if time.monotonic() - since >= patience_s:
                    self._kill()
            time.sleep(self.pause_s)

    def _kill(self) -> None:
        """The others wait for a rank that is no more: checkpoints are whole at any moment."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            # Ctrl-C again is passed on as it is: at once.
            self._send(signal.SIGINT if self._stopping and number == signal.SIGINT else signal.SIGTERM)
            self._stopping = True

        def save(number: int, frame: FrameType | None) -> None:
            self._send(signal.SIGUSR1)

        handlers = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGUSR1: save}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._kill()

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def check_ranks(config: RunConfig, ranks: int) -> None:
    """Refuse a number of ranks that the machine or the batches do not allow.

    Args:
        config: of the run.
        ranks: processes on this machine.

    Raises:
        UserError: if there are fewer GPUs, a batch cannot be shared evenly, or this is a process of torchrun.
    """
    check_gpus(ranks)
    check_batches(config, ranks)


def check_gpus(ranks: int) -> None:
    """Refuse a number of processes that the machine does not allow.

    Args:
        ranks: processes on this machine.

    Raises:
        UserError: if there are fewer GPUs, or this is a process of torchrun.
    """
    gpus = torch.cuda.device_count()
    if gpus and ranks > gpus:
        raise UserError(
            f"--nproc is {ranks}, but this machine has {gpus} GPUs; a process needs one of its own"
        )
    if launched():
        raise UserError("--nproc was given to a process of torchrun; leave one of the two out")


def lost_another(error: RuntimeError) -> bool:
    """Whether an error says that another rank is no more."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return launched() and any(word in str(error) for word in words)


def without_nproc(words: Sequence[str]) -> list[str]:
    """The words of a command without ``--nproc``."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--nproc" and not word.startswith("--nproc="):
            kept.append(word)
        skip = word == "--nproc"
    return kept


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _sentence(rank: int, code: int) -> str:
    if code < 0:
        return f"rank {rank} was killed ({signal.Signals(-code).name})"
    return f"rank {rank} ended with exit code {code}"
