"""Several processes on one machine: signals, lost ranks, a lost launcher, mistakes, torchrun."""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

import faults
from shoestring.training.folder import checkpoint_folders
from shoestring.training.launch import MAX_RESTARTS, Launcher, without_nproc

pytestmark = pytest.mark.slow  # launchers and ranks, each a process of its own
NIMG = 348


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return faults.write_recipe(tmp_path_factory.mktemp("recipe"), NIMG - 48, 60)


SHARDED = "parallel.sharding=fsdp"  # copies: test_faults.py


@pytest.fixture(scope="module")
def calm(recipe, tmp_path_factory) -> Path:
    """A run on two ranks that nothing happens to."""
    folder = faults.prepare(tmp_path_factory.mktemp("runs") / "calm")
    with faults.Launched(recipe, folder, SHARDED) as launched:
        assert launched.ended(300) == 0, launched.words()
    return folder


def test_a_disturbed_run_ends_like_a_calm_one(calm, recipe, tmp_path, mistake):
    """Asked to save, a rank killed, the launcher killed, stopped: the same command, and the same weights."""
    run = faults.prepare(tmp_path / "run", calm)
    with faults.Launched(recipe, run, SHARDED) as launched:
        assert launched.reaches(24)
        launched.kill(launched.process.pid, signal.SIGUSR1)
        # A checkpoint whose turn it is not.
        assert faults.until(lambda: any(int(f.name) % 60 for f in checkpoint_folders(run)))
        assert launched.reaches(72)
        ranks = launched.rank_pids()
        launched.kill(ranks[1])
        assert faults.until(lambda: len(set(launched.rank_pids()) - set(ranks)) == 2)
        assert faults.until(lambda: "Going on from image" in launched.words())
        # Another command in the same folder is refused, as long as this one lives.
        assert f"another run is working in {run}" in mistake("train", recipe, "--out", run)
        done = int(faults.newest(run).name)
        assert faults.until(lambda: faults.last_nimg(run) > done)
        launched.kill(launched.process.pid)
        began = time.monotonic()
        assert launched.ended() == -signal.SIGKILL
        assert time.monotonic() - began < 30
    assert not list((run / "checkpoints").glob(".*"))
    assert "rank 1 was killed (SIGKILL); starting again from the last checkpoint" in launched.words()
    stopped = int(faults.newest(run).name)
    assert stopped > done
    with faults.Launched(recipe, run, SHARDED) as launched:
        assert faults.until(lambda: launched.words().count(f"Going on from image {stopped}") == 1)
        assert launched.reaches(stopped + 12)
        began = time.monotonic()
        launched.kill(launched.process.pid, signal.SIGTERM)
        for pid in launched.rank_pids():  # schedulers send it to all processes
            launched.kill(pid, signal.SIGTERM)
        assert launched.ended() == 130
        assert time.monotonic() - began < 30
    assert int(faults.newest(run).name) > stopped
    assert "the same command goes on from there" in launched.words()
    # The neighbour of a killed rank may have had time to say that it is gone; otherwise nothing is thrown.
    assert "Traceback" not in launched.words().partition("Going on from image")[2]
    with faults.Launched(recipe, run, SHARDED) as launched:
        assert launched.ended(300) == 0, launched.words()
    assert faults.result(run) == faults.result(calm)


def test_torchrun_goes_on_with_a_run_of_the_launcher(calm, recipe, tmp_path):
    """The last part of a run under torchrun: its environment is all that the ranks need."""
    run = tmp_path / "run"
    shutil.copytree(calm, run)
    shutil.rmtree(faults.newest(run))
    words = faults.command(recipe, run, SHARDED)[1:]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, *launcher, *words]
    done = subprocess.run(words, env=faults.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Going on from image 300" in done.stdout
    assert faults.result(run) == faults.result(calm)


# -- mistakes ----------------------------------------------------------------------------------------------


def test_a_mistake_that_only_the_ranks_find_is_said_once(recipe, tmp_path):
    words = ["data.source=folder", f"data.path={tmp_path / 'nowhere'}", "--nproc", 2]
    done = subprocess.run(
        faults.command(recipe, tmp_path / "run", *words),
        env=faults.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("shoestring: ")
    assert "nowhere" in lines[0]
    assert "starting again" not in done.stdout


def test_mistakes_that_need_no_rank(recipe, tmp_path, mistake, monkeypatch):
    words = ("train", recipe, "--out", tmp_path / "run", "--nproc")
    assert "batch is 12, which 5 ranks cannot share evenly" in mistake(*words, 5)
    assert "hybrid" in mistake(*words, 2, "parallel.sharding=zero")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave one of the two out" in mistake(*words, 2)
    assert not (tmp_path / "run").exists()


def test_the_ranks_get_the_same_words():
    words = ["train", "x.yaml", "--nproc", "4", "a.b=1", "--nproc=2", "--out", "nproc"]
    assert without_nproc(words) == ["train", "x.yaml", "a.b=1", "--out", "nproc"]


# -- ranks that are lost again and again -------------------------------------------------------------------


class Hunter(threading.Thread):
    """Kills a rank of a launcher in this process as soon as it is there, so many times."""

    def __init__(self, launcher: Launcher, times: int, before=lambda k: None) -> None:
        super().__init__(daemon=True)
        self.launcher, self.times, self.before = launcher, times, before
        self.killed: list[int] = []

    def run(self) -> None:
        while len(self.killed) < self.times:
            for process in list(self.launcher._processes):
                if process.pid not in self.killed and process.poll() is None:
                    self.before(len(self.killed))
                    self.killed.append(process.pid)
                    process.kill()
                    process.wait()
                    break
            time.sleep(0.02)


def hunted(run: Path, times: int, before=lambda k: None) -> tuple[int, str]:
    console = Console(record=True, width=500, file=io.StringIO())
    launcher = Launcher(["recipes", "list"], 1, run, console, pause_s=0.02)
    hunter = Hunter(launcher, times, before)
    hunter.start()
    code = launcher.run()
    hunter.join(10)
    return code, console.export_text()


def test_a_rank_that_is_lost_at_every_start(tmp_path):
    code, said = hunted(tmp_path, MAX_RESTARTS + 1)
    assert code == 1
    assert said.count("rank 0 was killed (SIGKILL); starting again") == MAX_RESTARTS
    assert "rank 0 was killed (SIGKILL); 3 starts in a row reached no further checkpoint" in said


def test_starts_are_counted_anew_when_the_run_got_further(tmp_path):
    def before(k: int) -> None:
        (tmp_path / "checkpoints" / f"{k // 3:09d}").mkdir(parents=True, exist_ok=True)

    code, said = hunted(tmp_path, 2 * MAX_RESTARTS, before)
    assert code == 0  # in peace at last, it lists the recipes
    assert said.count("starting again") == 2 * MAX_RESTARTS


def test_halving_the_images_at_once_is_no_reason_to_give_up(tmp_path):
    """Ranks that end for want of memory: the others, which wait for them, are ended, and all start again."""
    console = Console(record=True, width=500, file=io.StringIO())
    launcher = Launcher([], 2, tmp_path, console, pause_s=0.02)
    codes = [4] * (2 * MAX_RESTARTS) + [0]

    def start() -> None:
        code = codes.pop(0)
        other = "import time; time.sleep(60)" if code else ""
        words = ([sys.executable, "-S", "-c", text] for text in (other, f"raise SystemExit({code})"))
        launcher._processes = [subprocess.Popen(each) for each in words]

    launcher._start = start
    assert launcher.run() == 0
    assert not codes


def test_a_stop_that_comes_between_two_starts_is_not_lost(tmp_path):
    """The signal arrives when the old rank is dead and the new one is not known yet."""
    console = Console(record=True, width=500, file=io.StringIO())
    launcher = Launcher(["recipes", "list"], 1, tmp_path, console, pause_s=0.02)
    start = launcher._start

    def interrupted_start() -> None:
        signal.raise_signal(signal.SIGTERM)
        start()

    launcher._start = interrupted_start
    assert launcher.run() == 130
    assert not [process for process in launcher._processes if process.poll() is None]


def test_a_request_to_save_does_not_end_a_starting_rank(tmp_path):
    console = Console(record=True, width=500, file=io.StringIO())
    launcher = Launcher(["recipes", "list"], 1, tmp_path, console, pause_s=0.02)

    def ask() -> None:
        faults.until(lambda: launcher._processes)
        for _ in range(20):
            launcher._send(signal.SIGUSR1)
            time.sleep(0.05)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert launcher.run() == 0
    thread.join()
    assert "starting again" not in console.export_text()
