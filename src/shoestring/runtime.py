"""Random streams, devices, threads, whole files: what every layer may need and none owns."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path
from threading import Barrier
from typing import IO, Any, TypeVar

import torch
from rich.console import Console

Item = TypeVar("Item")
Result = TypeVar("Result")

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


class ExitCode(IntEnum):
    """How a command ended; 0 is well."""

    LOST = 1
    """A process of the run is no more."""
    MISTAKE = 2
    FAILED = 3
    """Training diverged."""
    NO_MEMORY = 4
    """With fewer images at once, noted already, the same command goes on."""
    INTERRUPTED = 130


class UserError(ValueError):
    """A mistake of the user: shown as one sentence, exit code 2, no traceback."""


class SaidElsewhere(UserError):
    """A mistake that another process of the run has reported already."""


class OutOfMemory(RuntimeError):
    """A rank has too little memory; with fewer images at once, already noted, the run has to start again."""


class TrainingFailed(RuntimeError):
    """Training diverged; said in one sentence, the last good checkpoint is kept."""


def stream_seed(seed: int, purpose: str, index: int = 0) -> int:
    """A 63-bit seed that depends on (seed, purpose, index) and on nothing else.

    Args:
        seed: the run's seed; 0 is a seed like any other.
        purpose: what the numbers are for, e.g. ``"train"``; different purposes are independent.
        index: images seen, sample index or epoch; never a rank, so that results do not depend on ranks.

    Returns:
        A non-negative integer below 2**63.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator for the stream (seed, purpose, index); see :func:`stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, index))


def pick_device(name: str = "auto") -> torch.device:
    """The device to run on: ``auto`` takes CUDA, then Apple's MPS, then the CPU.

    Args:
        name: ``auto`` or a torch device string.

    Returns:
        The device.

    Raises:
        UserError: if the named device is unknown or absent.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        usable = device.type != "meta" and torch.zeros(1, device=device).item() == 0
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = False
    if not usable:
        raise UserError(f"device: {name!r} is not available here; try auto or cpu")
    return device


def say(console: Console, text: str) -> None:
    """Print a sentence as it is: no markup (paths and captions may hold brackets), no colours, no breaks."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def atomic_write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that it is there whole or not at all: temporary name, flush, rename.

    Args:
        path: the file to make; its folder is made if needed.
        write: called with the open binary file.

    Raises:
        UserError: if the disk is full or the folder cannot be written; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {path}: {reason}; nothing was changed") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write text atomically as UTF-8; see :func:`atomic_write`."""
    atomic_write(path, lambda file: file.write(text.encode()))


class Workers:
    """A thread per core on a CPU; on other devices, or with one worker, the calling thread.

    Splitting each operation over the cores (OpenMP) costs a wake-up each time: with
    ``OMP_WAIT_POLICY=PASSIVE`` that halves the speed of small models, and without it a second busy process
    slows every step many times over. A thread per core, each with its own part of the batch and
    single-threaded operations, has neither problem (figures in EXPERIMENTS.md). PyTorch releases the
    interpreter lock inside operations and during the backward pass.

    Args:
        count: threads.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None
        if count > 1:
            threads = torch.get_num_threads()
            # All threads are started now: OpenMP's number of threads belongs to the calling thread, but
            # that of MKL to the process, so the main thread's is set again afterwards.
            barrier = Barrier(count)
            self._pool = ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(1))
            list(self._pool.map(lambda _: barrier.wait(), range(count)))
            torch.set_num_threads(threads)

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], together: bool = True
    ) -> list[Result]:
        """The function of every item, in the order of the items.

        Args:
            function: must not change what others read.
            items: pieces of work.
            together: at the same time; else one after another, but in the same threads.

        Returns:
            Results in order.
        """
        if self._pool is None:
            return [function(item) for item in items]
        grad = torch.is_grad_enabled()  # a thread's own setting, which would otherwise be the default

        def call(item: Item) -> Result:
            with torch.set_grad_enabled(grad):
                return function(item)

        if not together:
            return [self._pool.submit(call, item).result() for item in items]
        return list(self._pool.map(call, items))

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def default_workers(device: torch.device) -> int:
    """As many workers as torch would use threads on a CPU, else one."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of handing it back and taking it anew, page by page.

    Every activation and gradient of a training step is a large allocation: by default a step of ``tiny2`` at
    batch 8 has 300,000 page faults, with this hardly any. Under another C library nothing happens.
    """
    trim_threshold, mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)
