"""Watching a run: what is shown of running, finished, empty and foreign folders; and the log behind it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from run_folders import config_of, make_checkpoint, make_run, train_row
from shoestring import cli
from shoestring.config import to_yaml
from shoestring.studies.runs import training_flops, works_now
from shoestring.studies.watch import change, sparkline, watch
from shoestring.training.display import LogFollower, RunLog, read_log, rows_of, status_line


def shown(folder: Path, width: int = 100) -> str:
    file = io.StringIO()
    watch(folder, Console(file=file, width=width), once=True)
    return file.getvalue()


def test_a_finished_run(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    make_checkpoint(tmp_path / "run", config)
    (tmp_path / "run" / "progress").mkdir()
    (tmp_path / "run" / "progress" / "000001000.png").touch()
    text = shown(tmp_path / "run", width=200)
    for part in ("tiny", "finished", "600 of 600", "400 of 400", "1,000 of 1,000", "10 images/s", "10 %"):
        assert part in text
    assert "validation loss" in text
    assert "time left" not in text
    assert "$1.00" in text  # 100 s at $36 an hour
    assert "progress/000001000.png" in text
    assert "checkpoints/000001000" in text
    assert "event" not in text


def test_a_run_in_its_second_stage_with_all_that_a_row_may_hold(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = make_run(folder, until=600)
    log = RunLog(folder, 600, config.logging)
    bins = {"0.1": 0.25, "20": 1.75}
    for nimg in (650, 700, 750, 800):
        row = train_row(config, nimg, 1.5, loss_per_bin={k: v * 100 / nimg for k, v in bins.items()})
        more = {"memory_bytes": 3.25e9, "data_wait_share": 0.02, "skipped": 2}
        log.write("train", row | more | {"expert_load": {"most": 1.5, "untouched": 0.25}})
    for i in range(8):
        log.write("event", {"nimg": 700, "what": "loss-spike", "text": f"[red]spike {i}[/red]"})
    log.close()
    text = shown(folder, width=200)
    assert "stopped" in text
    assert "50 %" in text  # of the second stage
    assert "about 20 s" in text  # 200 images at 10 a second
    assert "$0.80, $1.00 in all" in text
    for part in ("3.25 GB", "2 %", "most 1.5, untouched 0.25", "training loss in this stage"):
        assert part in text
    assert "steps skipped" in text
    assert " 8 " in text
    assert "[red]spike 7[/red]" in text  # text is no markup
    assert "spike 1" not in text
    assert "last 6 of 8" in text
    assert "-6.2 %" in text  # of each bin, from 750 to 800


def test_an_empty_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(config_of()))
    text = shown(tmp_path)
    assert "not begun" in text
    assert "0 of 600" in text
    assert "no line in log.jsonl yet" in text


def test_a_narrow_terminal_shows_it_too(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    assert max(map(len, shown(tmp_path / "run", width=60).splitlines())) <= 60


HOLD = """
import sys, time
from pathlib import Path
from shoestring.training.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_working_process_is_seen_until_it_dies(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make_run(folder, until=500)
    assert not works_now(folder)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert works_now(folder)
        assert "training now" in shown(folder)
    finally:
        process.kill()
        process.wait()
    assert not works_now(folder)
    assert "stopped" in shown(folder)


def test_in_a_terminal_it_goes_on_until_the_run_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = make_run(folder, until=900)
    file = io.StringIO()
    console = Console(file=file, width=120, height=50, force_terminal=True)
    thread = threading.Thread(target=watch, args=(folder, console))
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive()
    log = RunLog(folder, 900, config.logging)
    log.write("train", train_row(config, 1000, 1.0))
    log.close()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert "stopped" in file.getvalue()
    assert file.getvalue().rindex("finished") > file.getvalue().rindex("stopped")


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", until=300)
    monkeypatch.setattr(sys, "argv", ["shoestring", "watch", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stopped:  # not a terminal: once, although the run is not done
        cli.main()
    assert stopped.value.code == 0
    assert "300 of 1,000" in capsys.readouterr().out


def test_mistakes(tmp_path: Path, mistake: Callable[..., str]) -> None:
    assert "is missing; give a run folder" in mistake("watch", tmp_path / "nowhere")
    assert "holds no config.yaml" in mistake("watch", tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(config_of()) + "invented: 3\n")
    assert "invented" in mistake("watch", tmp_path)
    (tmp_path / "machine.json").write_text('{"shoestring": "9.9.0"}')
    said = mistake("watch", tmp_path)
    assert "invented" in said
    assert "trained by shoestring 9.9.0" in said
    assert "is a file" in mistake("watch", tmp_path / "config.yaml")


# -- the log -----------------------------------------------------------------------------------------------


def test_rows_that_a_roll_back_undid_are_left_out() -> None:
    def row(nimg: int, loss: float, kind: str = "train") -> dict[str, object]:
        return {"kind": kind, "nimg": nimg, "loss": loss}

    log = [row(10, 1), row(20, 2), row(20, 2, "validation"), row(30, 3), row(30, 9, "event")]
    log += [row(20, 4), row(30, 5)]  # back to 10, and on
    assert [(r["nimg"], r["loss"]) for r in rows_of(log, "train")] == [(10, 1), (20, 4), (30, 5)]
    assert [r["nimg"] for r in rows_of(log, "validation")] == [20]
    assert rows_of(log[:-1] + [row(15, 7)], "validation") == []
    back = row(10, 0, "event") | {"what": "rolled-back"}
    assert [r["nimg"] for r in rows_of([*log, back], "train")] == [10]
    assert rows_of([*log, back], "validation") == []


def test_after_an_interruption_the_log_is_cut_to_the_checkpoint(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run", until=400)
    before = read_log(tmp_path / "run")
    log = RunLog(tmp_path / "run", 250, config.logging)
    log.write("train", train_row(config, 300, 9.0))
    log.close()
    rows = read_log(tmp_path / "run")
    assert rows[:-1] == [row for row in before if row["nimg"] <= 250]
    assert rows[-1]["loss"] == 9.0


def test_what_a_roll_back_undid_stays_in_the_log_when_the_run_is_resumed(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run", until=400)
    log = RunLog(tmp_path / "run", 400, config.logging)
    log.write("event", {"nimg": 400, "what": "rolled-back", "text": "to image 200"})
    for nimg in (250, 300, 350):
        log.write("train", train_row(config, nimg, 9.0))
    log.close()
    log = RunLog(tmp_path / "run", 300, config.logging)
    log.close()
    rows = read_log(tmp_path / "run")
    assert [row["what"] for row in rows if row["kind"] == "event"] == ["rolled-back"]
    assert rows[-1]["nimg"] == 300
    assert [r["loss"] for r in rows_of(rows, "train")][-2:] == [9.0, 9.0]


def test_a_followed_log_is_read_piece_by_piece_and_anew_after_it_was_cut(tmp_path: Path) -> None:
    follower = LogFollower(tmp_path)
    assert follower.rows() == []
    path = tmp_path / "log.jsonl"
    rows = [{"kind": "train", "nimg": i} for i in range(3)]
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text(lines[0] + "damaged\n" + lines[1][:10])
    assert follower.rows() == rows[:1]
    path.write_text(lines[0] + "damaged\n" + lines[1] + lines[2])
    assert follower.rows() == rows == read_log(tmp_path)
    path.write_text(lines[2])
    assert follower.rows() == rows[2:]


def test_old_rows_have_flops_by_their_share_of_the_peak(tmp_path: Path) -> None:
    config = make_run(tmp_path / "run")
    train = rows_of(read_log(tmp_path / "run"), "train")
    # A tenth of 1e11 FLOP/s at ten images a second: 1e9 an image.
    assert training_flops(tmp_path / "run", train) == pytest.approx([1e9 * row["nimg"] for row in train])
    assert training_flops(tmp_path / "run", [train_row(config, 50, 1.0, training_flops=7)]) == [7.0]
    assert training_flops(tmp_path / "run", [{"nimg": 50}, train_row(config, 100, 1.0)]) == [None, None]


def test_small_pictures_of_numbers() -> None:
    assert sparkline([1, 10, 100], 3) == "▁▅█"
    assert sparkline([5.0, 5.0, float("nan")], 9) == "▁▁"
    assert len(sparkline(list(range(1, 100)), 24)) <= 24
    assert sparkline([-1.0, 0.0, 1.0], 3) == "▁▅█"
    assert sparkline([]) == ""
    assert change([2.0, 1.0]) == -0.5
    assert change([9.0] * 8 + [2.0, 2.0, 3.0, 3.0]) == 0.5
    assert change([1.0]) is None


def test_a_line_without_a_share_of_peak() -> None:
    row = train_row(config_of(), 100, 0.5)
    assert "(10% of peak)" in status_line(row, 1000, 90.0)
    del row["peak_share"]
    assert "10.0 images/s  1 min 30 s left" in status_line(row, 1000, 90.0)
