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
