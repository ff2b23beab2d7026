"""A tiny run on two ranks, things that happen to machines, and what must be the same afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random

from safetensors.torch import load_file

from shoestring.training.folder import checkpoint_folders

RECIPE = """
name: faulty
seed: 5
precision: fp32
model:
  in_channels: 3
  caption_dim: 256
  patch_size: 4
  dim: 32
  depth: 2
  head_dim: 16
  ffn_multiple_of: 16
  mixer: {depth: 1, dim: 32}
  experts: {count: 2}
  mask_captions: true
data: {source: shapes, max_captions: 24, text_encoder: hashing, max_tokens: 8, held_out: 0.2}
stages:
  - {name: masked, nimg: NIMG, batch: 12, resolution: 24, mask_ratio: 0.5, lr: 0.002, clip_norm: 1.0}
  - {name: dense, nimg: 48, batch: 12, resolution: 24, lr: 0.001, lr_schedule: cosine, warmup_nimg: 24}
power_ema: [0.1]
sampling: {steps: 2, guidance: 1.0, sampler: euler}
logging: {log_nimg: 12, validate_nimg: 1200, sample_nimg: 1200, checkpoint_nimg: SAVE, validation_images: 2, tensorboard: false}
"""  # noqa: E501
MACHINE = {"matmul_flops_fp32_cpu": 1e10, "workers_cpu": 1}
"""What a run would measure at its start: a second saved, each time."""
CHOSEN = re.compile("attention_|micro_batch_")
"""What a run chooses by timing or by memory; the bits depend on it."""


def write_recipe(folder: Path, nimg: int, save: int) -> Path:
    path = folder / "faulty.yaml"
    path.write_text(RECIPE.replace("NIMG", str(nimg)).replace("SAVE", str(save)))
    return path


def prepare(run: Path, like: Path | None = None) -> Path:
    """An empty run folder; the run will choose what another one has chosen."""
    run.mkdir(parents=True)
    machine = {} if like is None else json.loads((like / "machine.json").read_text())
    chosen = {key: value for key, value in machine.items() if CHOSEN.match(key)}
    (run / "machine.json").write_text(json.dumps(MACHINE | chosen))
    return run


def command(recipe: Path, run: Path, *more: object) -> list[str]:
    return [sys.executable, "-m", "shoestring.cli", "train", str(recipe), "--out", str(run), *map(str, more)]


def environment() -> dict[str, str]:
    """That of a shell, not of one of a run's ranks."""
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def last_nimg(run: Path) -> int:
    """Images that the log knows of; it is cut back when a run goes on from a checkpoint."""
    try:
        lines = (run / "log.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return max((row["nimg"] for row in rows if row["kind"] == "train"), default=0)


def newest(run: Path) -> Path:
    return checkpoint_folders(run)[-1]


def result(run: Path) -> dict[str, str]:
    """Digests of all that a run has learned, and its loss curve."""
    found = {}
    for name in ("weights", "ema", "power-0.1"):
        for key, tensor in load_file(newest(run) / f"{name}.safetensors").items():
            found[f"{name} {key}"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return found | {f"loss {r['nimg']}": f"{r['loss']!r}" for r in rows if r["kind"] == "train"}


def children(pid: int) -> list[int]:
    """Processes that a process has started and that live."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(each) for each in listed if alive(int(each))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, timeout_s: float = 120.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(met)


class Launched:
    """A run on several ranks that is going on in the background; ended when the block is left."""

    def __init__(self, recipe: Path, run: Path, *more: object, ranks: int = 2) -> None:
        self.run = run
        self.log_before = self.log()
        self.said = (run / "said.txt").open("a")
        self.process = subprocess.Popen(
            command(recipe, run, "--nproc", ranks, *more),
            env=environment(),
            stdout=self.said,
            stderr=subprocess.STDOUT,
        )
        self.ranks_now: list[int] = []

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [*self.rank_pids(), self.process.pid]:
            self.kill(pid)
        self.process.wait()
        self.said.close()

    def rank_pids(self) -> list[int]:
        """Of the ranks, also after their launcher has gone."""
        found = children(self.process.pid)
        if found:
            self.ranks_now = found
        return [pid for pid in self.ranks_now if alive(pid)]

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def log(self) -> int | None:
        """Which file the log is: one that goes on makes a new one."""
        log = self.run / "log.jsonl"
        return log.stat().st_ino if log.exists() else None

    def reaches(self, nimg: int) -> bool:
        """Wait until the run has started and got so far; false if it ended before."""

        def there() -> bool:
            return self.log() != self.log_before and last_nimg(self.run) >= nimg

        until(lambda: there() or self.process.poll() is not None, 240)
        self.rank_pids()
        return self.process.poll() is None

    def ended(self, timeout_s: float = 120.0) -> int:
        """The exit code, when all its processes are gone."""
        code = self.process.wait(timeout_s)
        assert until(lambda: not self.rank_pids(), timeout_s), "ranks live on"
        return code

    def limit_files(self, limit: int) -> None:
        """Files may not grow beyond so many bytes, as if the disk were full; -1 = as large as they like."""
        for pid in self.rank_pids():
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def words(self) -> str:
        return (self.run / "said.txt").read_text()


KINDS = ("rank", "launcher", "power", "stop", "stop-rank", "disk", "truncate", "flip")


def disturb(recipe: Path, run: Path, total: int, kinds: list[str], random: Random, tell=print) -> int:
    """Train to the end in spite of everything, by nothing but the same command.

    Args:
        recipe: to train.
        run: folder.
        total: images of the run.
        kinds: what happens, one after another; see ``KINDS``.
        random: chooses the moments and places.
        tell: called with a line for each.

    Returns:
        How often the command was given.
    """
    waiting, commands = list(kinds), 0
    while True:
        commands += 1
        assert commands < 3 * len(kinds) + 5, "no progress"
        with Launched(recipe, run) as launched:
            while waiting:
                if random.random() < 0.15:  # while it starts
                    time.sleep(6 * random.random())
                else:
                    done = max((int(f.name) for f in checkpoint_folders(run)), default=0)
                    share = (total - done) / (len(waiting) + 1)
                    goal = done + random.randint(0, max(12, int(1.5 * share)))
                    if not launched.reaches(min(goal, total - 24)):
                        break
                    time.sleep(0.2 * random.random())
                kind = waiting.pop(0)
                tell(f"{len(kinds) - len(waiting)}: {kind} at image {last_nimg(run)}")
                if happen(launched, kind, random, tell):
                    break
            else:
                launched.process.wait(300)
            code = launched.ended()
        tell(f"   exit code {code}, checkpoints {[int(f.name) for f in checkpoint_folders(run)]}")
        if code == 0 and not waiting:
            return commands
        if code == 0:
            raise AssertionError("the run was over before all had happened")


def happen(launched: Launched, kind: str, random: Random, tell) -> bool:
    """One fault; whether the command must be given again."""
    pids, launcher = launched.rank_pids(), launched.process.pid
    if kind in {"rank", "stop-rank"}:
        # The launcher starts again where a rank was killed, or asked to stop before it could listen.
        number = signal.SIGKILL if kind == "rank" else signal.SIGTERM
        launched.log_before = launched.log()
        launched.kill(random.choice(pids or [launcher]), number)
        until(lambda: set(launched.rank_pids()).isdisjoint(pids) or launched.process.poll() is not None)
        return launched.process.poll() is not None
    if kind == "disk":
        known = launched.words().count("cannot write checkpoint")
        launched.limit_files(random.randint(60_000, 300_000))
        until(lambda: launched.words().count("cannot write checkpoint") > known or not alive(launcher), 30)
        launched.limit_files(-1)
        return launched.process.poll() is not None
    if kind == "launcher":
        launched.kill(launcher)
    elif kind == "stop":
        launched.kill(launcher, signal.SIGTERM)
    else:  # the machine is gone, all at once
        for pid in [launcher, *pids]:
            launched.kill(pid)
    launched.ended()
    folders = checkpoint_folders(launched.run)
    if kind in {"truncate", "flip"} and len(folders) > 1:  # never the last whole copy
        damage(random.choice(files(folders[-1])), kind, random, tell)
    return True


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def damage(file: Path, kind: str, random: Random, tell=print) -> None:
    data = bytearray(file.read_bytes())
    place = random.randrange(len(data))
    if kind == "truncate":
        data = data[:place]
    else:
        data[place] ^= 1 << random.randrange(8)
    file.write_bytes(data)
    tell(f"   {kind} {file.parent.name}/{file.name} at byte {place}")
