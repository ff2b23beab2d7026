"""``shoestring data ingest`` and ``prepare`` as users give them: short walks, wrong options, Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raw_stores import make_raw
from shoestring.data.store import Store
from shoestring.runtime import UserError
from test_ingest import encoded, make_folder, noise

Mistake = Callable[..., str]
Call = Callable[..., str]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Give a command that must succeed; what it printed."""
    from shoestring import cli

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["shoestring", "data", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr()
        assert not stopped.value.code, said.err
        return said.out

    return run


@pytest.fixture
def raw(tmp_path: Path) -> str:
    return make_raw(tmp_path / "raw", rows=12).uri


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good pictures, one with a name of other letters, a hidden and a broken one."""
    path = tmp_path / "pics"
    path.mkdir()
    for name in ("a", "b b", "ünï 猫", ".hidden"):
        (path / f"{name}.png").write_bytes(encoded(noise(len(name))))
        (path / f"{name}.txt").write_text(f"caption of\n{name}", encoding="utf-8")
    (path / "broken.png").write_bytes(b"nothing")
    (path / "broken.txt").write_text("broken")
    return path


def test_a_list_of_what_was_rejected_stays_with_a_store_that_gets_columns(
    folder: Path, tmp_path: Path, call: Call
) -> None:
    store = tmp_path / "store"
    said = call("ingest", folder, "--out", store)
    assert said.splitlines()[0] == "4 read, 3 kept, 1 rejected"  # and no line of progress for so short a job
    assert Store(str(store)).texts.to_table()["text"].to_pylist() == [
        *("caption of a", "caption of b b", "caption of ünï 猫")
    ]
    call("prepare", store, "--out", store, "--resolution", 16, "--text-encoder", "hashing")
    assert "broken.png\tunusable picture" in call("rejected", store)
    assert "is whole" in call("verify", store)
    assert not (store / ".work").exists()


def test_a_store_gets_an_encoder_or_a_teacher_alone(raw: str, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "out"
    call("prepare", raw, "--out", out, "--resolution", 16, "--text-encoder", "none")
    said = call("prepare", raw, "--out", out, "--text-encoder", "hashing")
    assert "hashing_tokens" in said
    assert "moments" not in said
    said = call("prepare", raw, "--out", out, "--resolution", 32)
    assert "moments_32" in said
    assert "minilm" not in said  # a store that is there gets only what is asked for
    assert "has all of these latents" in call("prepare", raw, "--out", out, "--resolution", 32)
    manifest = Store(str(out)).manifest
    assert [c.name for c in manifest.latents] == ["16", "32"]
    assert [c.name for c in manifest.text] == ["hashing"]


def test_mistakes_name_the_option_as_it_was_given(raw: str, tmp_path: Path, mistake: Mistake) -> None:
    out = tmp_path / "out"

    def says(*words: object) -> str:
        said = mistake("data", "prepare", raw, "--out", out, *words)
        assert "data." not in said
        assert not out.exists()
        return said

    plain = ("--resolution", 16, "--text-encoder", "none")
    assert "--codec-path is not set; --codec taef2 needs" in says(*plain, "--codec", "taef2")
    wrong = says(*plain, "--codec", "taef2", "--codec-path", tmp_path)
    assert wrong.startswith(f"shoestring: --codec-path is '{tmp_path}': cannot load TAEF2")
    assert "--codec-path was given with --codec pixels" in says(*plain, "--codec-path", tmp_path)
    assert "--text-encoder-path is not set" in says("--resolution", 16, "--text-encoder", "clip")
    assert "--device 'tpu9' is not available" in says(
        *plain, "--codec", "taef2", "--codec-path", "x", "--device", "tpu9"
    )
    for option, value in (
        ("--max-tokens", 9),
        ("--positions", "all"),
        ("--dtype", "int8"),
        ("--text-name", "x"),
    ):
        assert f"{option} was given with no text encoder" in says(*plain, option, value)
    for option, value in (("--workers", 2), ("--gpus", 1), ("--address", "auto")):
        assert f"{option} was given with --engine local" in says(*plain, option, value)
    for option in ("--min-bucket", "--bucket-aspect"):
        assert f"{option} was given with no --buckets" in says(*plain, option, 2)
    assert "--text-name is 'a b'" in says(
        "--resolution", 16, "--text-encoder", "hashing", "--text-name", "a b"
    )
    assert "--resolution is 1000000; it must be at most" in says("--resolution", 1_000_000)
    assert "no resolution is given" in says("--text-encoder", "none")


def test_mistakes_of_ingestion(folder: Path, tmp_path: Path, mistake: Mistake) -> None:
    out = tmp_path / "out"

    def says(*words: object) -> str:
        said = mistake("data", "ingest", folder, "--out", out, *words)
        assert not out.exists()
        return said

    assert "--where is 'a>2'; write COLUMN>=NUMBER" in says("--where", "a>2")
    assert "--drop-similar is 30; choose 0 to 11" in says("--drop-similar", 30)
    assert "--min-caption is 9 and --max-caption is 3" in says("--min-caption", 9, "--max-caption", 3)
    assert "--id was given, but folder has no use for it" in says("--id", "x")
    assert "has no column 'x', as it has no caption file" in says("--caption", "x")
    said = mistake("data", "ingest", folder, "--out", folder)
    assert "--out is" in said
    assert not (folder / "records").exists()
    assert "give its place with --path" in mistake("data", "ingest", "sa1b", "--out", out)


def test_captions_are_refused_before_a_model_is_loaded(raw: str, mistake: Mistake) -> None:
    absent = ("--captioner", "/no/such/model")
    assert "--name is 'a b'" in mistake("data", "caption", raw, *absent, "--name", "a b")
    assert "--encoder-tokens was given with no --text-encoder" in mistake(
        "data", "caption", raw, *absent, "--encoder-tokens", 9
    )
    assert "--encoder-tokens is 999" in mistake(
        "data", "caption", raw, *absent, "--text-encoder", "hashing", "--encoder-tokens", 999
    )


@pytest.mark.slow
def test_ctrl_c_ends_with_a_sentence_and_the_same_command_goes_on(tmp_path: Path, call: Call) -> None:
    out = tmp_path / "out"
    # Not shapes: numpy's Generator.choice, which draws them, swallows an interruption now and then.
    names = [f"{i:05}.png" for i in range(6_000)]
    pictures = make_folder(
        tmp_path / "pics", dict.fromkeys(names, encoded(noise(1, 64, 64))), dict.fromkeys(names, "x")
    )
    words = ["data", "ingest", str(pictures), "--out", str(out)]
    # Shells let what they start in the background ignore the signal, and so all that is started from there.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code += "; from shoestring.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
    while not (out / ".work" / "ingest" / "unit-000000.npz").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.strip() == "shoestring: interrupted; the same command goes on from here"
    assert "6,000 read, 6,000 kept" in call(*words[1:])


def test_old_versions_go_when_their_pin_is_given_up(
    raw: str, tmp_path: Path, call: Call, mistake: Mistake
) -> None:
    store = tmp_path / "store"
    call("prepare", raw, "--out", store, "--resolution", 16, "--text-encoder", "hashing")
    first = Store(str(store))
    first.pin("run-1")
    call("prepare", raw, "--out", store, "--feature", "efflite0")
    call("clean", store)
    assert Store(str(store), first.version).manifest == first.manifest
    assert "run-1" in mistake("data", "unpin", store, "run-2")
    call("unpin", store, "run-1")
    assert "0 bytes" not in call("clean", store)
    with pytest.raises(UserError, match="cannot be opened"):
        Store(str(store), first.version)
    assert "is whole" in call("verify", store)


def test_prepare_joins_fragments_if_asked_to(tmp_path: Path, call: Call) -> None:
    raw = make_raw(tmp_path / "raw", rows=12, unit_rows=4).uri
    for name, words in (("plain", []), ("joined", ["--compact"])):
        call(
            "prepare", raw, "--out", tmp_path / name, "--resolution", 16, "--text-encoder", "hashing", *words
        )
    plain, joined = Store(str(tmp_path / "plain")), Store(str(tmp_path / "joined"))
    assert [len(store.records.get_fragments()) for store in (plain, joined)] == [3, 1]
    assert joined.records.to_table().equals(plain.records.to_table())
    assert "is whole" in call("verify", joined.uri)
