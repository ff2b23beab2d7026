"""Random streams, devices and clean endings: what every layer may need and none owns."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


class UserError(ValueError):
    """A mistake of the user: shown as one sentence, exit code 2, no traceback."""


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
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} is not available here; try auto or cpu") from error
    return device


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
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
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
