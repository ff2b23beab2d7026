"""Processes that start at once: commands of ours, and functions of a test file as the ranks of one run.

They are forked from a server that has imported what takes seconds, and has done nothing else.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import resource
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["shoestring.cli", "shoestring.training.loop", "shoestring.data.precompute", "torch.utils.tensorboard"]
)


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    returncode: int | None
    stdout: str
    stderr: str


def shoestring(
    *words: object, cwd: Path, timeout_s: float = 300, file_limit: int = resource.RLIM_INFINITY
) -> Done:
    """Run a command to its end in a process of its own, which may write files of so many bytes."""
    with TemporaryDirectory() as place:
        out, errors = Path(place) / "out", Path(place) / "errors"
        streams = (str(out), str(errors))
        process = FORKS.Process(target=_command, args=([*map(str, words)], str(cwd), *streams, file_limit))
        process.start()
        process.join(timeout_s)
        process.kill()
        process.join()
        return Done(process.exitcode, out.read_text(), errors.read_text())


def _command(words: list[str], cwd: str, out: str, errors: str, file_limit: int) -> None:
    os.chdir(cwd)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = ["shoestring", *words]
    for number, path in ((1, out), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    from shoestring.cli import main

    main()


def run_ranks(ranks: int, function: str, *words: Any, timeout_s: float = 240) -> list[Any]:
    """What ``module:function`` returns on each rank; it is called with the words, and returns JSON."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    processes, answers = [], []
    for rank in range(ranks):
        answer, end = FORKS.Pipe(duplex=False)
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = FORKS.Process(target=_rank, args=(end, own, function, json.dumps(words)))
        process.start()
        end.close()  # so that an answer that never comes is seen
        processes.append(process)
        answers.append(answer)
    deadline = time.monotonic() + timeout_s
    try:
        return [_read(answer, deadline - time.monotonic()) for answer in answers]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _read(answer: Connection, wait_s: float) -> Any:
    assert answer.poll(max(0.0, wait_s)), "a rank has not answered in time"
    good, text = answer.recv()
    assert good, text
    return json.loads(text)


def _rank(answer: Connection, environment: dict[str, str], function: str, words: str) -> None:
    """What a process does: the function, and tell what it returned or how it failed."""
    os.environ.update(environment)
    try:
        module, name = function.split(":")
        result = getattr(importlib.import_module(module), name)(*json.loads(words))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        answer.send((True, json.dumps(result)))
    except BaseException:
        answer.send((False, traceback.format_exc()[-3000:]))
        sys.exit(1)
