"""What the commands say before anything runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shoestring import cli


@pytest.mark.parametrize(
    ("command", "default"),
    [
        ("train", "[default: runs/NAME, or runs/NAME-FOLDER for own pictures]"),
        ("sample", "[default: as configured]"),
        ("ema", "[default: RUN/averages]"),
        ("compare", "[default: auto]"),
    ],
)
def test_help_shows_defaults_in_words(
    command: str, default: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["shoestring", command, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert default in " ".join(re.sub("[│╭╮╰╯]", " ", capsys.readouterr().out).split())


def test_a_missing_device_is_said_before_ranks_are_started(
    mistake: Callable[..., str], tmp_path: Path
) -> None:
    words = ("train", "demo-shapes", "--out", tmp_path / "run", "--nproc", 2, "device=abacus")
    assert "device: 'abacus' is not available here" in mistake(*words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'recipe'"),
        (["train", "demo", "--nprc", 2], "No such option: --nprc (Possible options: --nproc)"),
        (["sample", "x", "--num", "many"], "'--num': Input should be a valid integer"),
        (["data", "verify"], "Missing argument"),
    ],
)
def test_wrong_words_are_one_sentence_that_points_to_the_help(
    mistake: Callable[..., str], words: list[object], expected: str
) -> None:
    said = mistake(*words)
    assert expected in said
    assert "--help lists what there is" in said
