"""``shoestring eval``: protocols, references, and what goes wrong, each as a sentence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evaluations import CPU, QUIET, RECIPE, compared_with, small
from shoestring.config import apply_overrides, parse_yaml, to_yaml
from shoestring.data.ingest import ingest
from shoestring.data.readers import open_reader
from shoestring.evaluation.moments import read_moments, read_reference_pictures
from shoestring.evaluation.protocol import find_protocol, protocols
from shoestring.runtime import UserError
from shoestring.studies.evaluate import Evaluation
from shoestring.studies.evaluate_figures import evaluate
from shoestring.training.loop import train
from stores import make_store
from test_ingest import encoded, make_folder, noise


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert train(parse_yaml(RECIPE), folder, QUIET)
    return folder


# -- protocols and mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", protocols())
def test_protocols_are_written_and_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(to_yaml(protocols()[name]))
    assert find_protocol(str(path)) == find_protocol(name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["metrics=[fid, nothing]"], "metrics.1 is 'nothing'; it must be fid, sfid"),
        (["count_=2"], "unknown key 'count_'; did you mean 'count'?"),
        (["prompts=file"], "prompts is file, but prompts_file is not set"),
        (["prompts_file=x.txt"], "prompts_file is set, but prompts is held-out; nothing would read it"),
        (["reference=file"], "need one another"),
        (["metrics=[geneval]"], "metric geneval needs prompts=geneval, not held-out"),
        (["metrics=[retrieval]"], "metric retrieval needs prompts=training"),
        (["metrics=[diversity]"], "metric diversity needs two seeds or more, not [1]"),
        (["count=0"], "count is 0; it must be a whole number of at least 1"),
        (["bootstrap=1"], "bootstrap is 1; an interval needs two rounds or more"),
        (["judge=shapes"], "judge is set, but metrics are kid-efflite0, fd-efflite0; nothing would read it"),
        (["neighbours=5"], "neighbours is set, but metrics are"),
        (["loss_pictures=5"], "loss_pictures is set, but metrics are"),
        (["extractors={inceptoin: x}"], "extractors.inceptoin is set, but the names are clip-vitb32"),
        (["prompts=classes", "seeds=[1, 2]"], "prompts=classes needs one seed, not [1, 2]"),
        (["prompts=classes", "most_prompts=2"], "most_prompts is set, but prompts is classes"),
        (["prompts=questions"], "prompts is questions, but prompts_file is not set"),
        (["metrics=[questions]"], "metric questions needs prompts=questions, not held-out"),
    ],
)
def test_wrong_protocols_are_sentences(changes: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        apply_overrides(find_protocol("quick"), changes)


def test_mistakes_are_sentences(run: Path, tmp_path: Path, mistake) -> None:
    assert "protocol is 'nothing'; choose from quick, demo" in mistake("eval", run, "--protocol", "nothing")
    assert "does not exist" in mistake("eval", tmp_path / "none")
    assert "holds no power-0.1.safetensors; choose from ema, weights" in mistake(
        "eval", run, "weights=power-0.1"
    )
    assert "prompts=classes, but the model's condition is text" in mistake(
        "eval", run, "prompts=classes", "--out", tmp_path
    )
    assert "cannot read prompts_file none.txt" in mistake(
        "eval", run, "prompts=file", "prompts_file=none.txt"
    )
    said = mistake("eval", run, "count=100000", "--out", tmp_path)
    assert "count is 100,000, but" in said
    assert "lower it, or add seeds" in said
    assert "reference is none" in mistake(
        "eval", run, "count=4", "micro_batch=4", "reference=none", "--out", tmp_path
    )
    np.savez(tmp_path / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    words = [
        "metrics=[fd-efflite0]",
        "reference=file",
        f"reference_files={{efficientnet-lite0: {tmp_path / 'other.npz'}}}",
    ]
    said = mistake("eval", run, "count=4", "micro_batch=4", *words, "--out", tmp_path)
    assert "holds statistics of 7 features, and efficientnet-lite0 gives 1280" in said
    (tmp_path / "empty").mkdir()
    said = mistake("eval", run, "count=4", "metrics=[fid]", "reference=file", "reference_files={a: b.npz}")
    assert "reference_files.a is set, but the names are efficientnet-lite0, inception, dinov2" in said
    words = ["metrics=[fd-efflite0]", "reference=file", "reference_files={inception: b.npz}"]
    said = mistake("eval", run, "count=4", *words)
    assert "reference_files has none of efficientnet-lite0, only of inception" in said
    stats = ("eval", "stats", tmp_path / "empty", "--out", tmp_path / "s.npz")
    assert "holds 0 pictures; at least 2" in mistake(*stats)
    assert "ends in .npz" in mistake("eval", "stats", tmp_path, "--out", "stats.txt")


def test_statistics_of_a_folder_serve_as_reference(run: Path, tmp_path: Path, mistake, capsys) -> None:
    from shoestring.cli.main import app

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(pictures / f"{i}.png")
    out = tmp_path / "stats.npz"
    words = ["eval", "stats", str(pictures), "--out", str(out), "--extractor", "efficientnet-lite0"]
    app(words, standalone_mode=False)
    place = compared_with(out)
    protocol = small("quick", "count=6", "metrics=[fd-efflite0]", *place)
    result = evaluate(Evaluation(run, protocol, tmp_path / "eval", CPU, QUIET), QUIET)
    assert result.figures["fd_efflite0"].value > 0
    (pictures / "broken.png").write_bytes(b"no picture")
    assert "cannot be read as a picture" in mistake(*words)
    made = tmp_path / "made.npz"
    shutil.copy(out, made)
    assert any("5 reference pictures are fewer than the 1280 features" in text for text in result.warnings)
    assert any("6 pictures drawn are fewer than the 1280 features" in text for text in result.warnings)
    wrong = apply_overrides(
        protocol, [f"reference_files={{efficientnet-lite0: {made}}}", "metrics=[kid-efflite0]"]
    )
    with pytest.raises(UserError, match=r"needs the features of every real picture.*fd-efflite0"):
        evaluate(Evaluation(run, wrong, tmp_path / "eval", CPU, QUIET), QUIET)


def test_statistics_of_a_store_are_those_of_its_pictures(tmp_path: Path, mistake, capsys) -> None:
    from shoestring.cli.main import app

    folder = make_folder(
        tmp_path / "pictures",
        {f"{i}.png": encoded(noise(i, 24 + 8 * i, 40)) for i in range(4)},
        {f"{i}.png": f"picture {i}" for i in range(4)},
    )
    store = ingest(open_reader(str(folder)), str(tmp_path / "store"))
    words = ["--extractor", "efficientnet-lite0", "--side", "24"]
    found = {}
    for name, place in (("folder", folder), ("store", store.uri)):
        app(
            ["eval", "stats", str(place), "--out", str(tmp_path / f"{name}.npz"), *words],
            standalone_mode=False,
        )
        found[name] = read_moments(tmp_path / f"{name}.npz")
    assert "the pictures have 4 sizes" not in capsys.readouterr().err
    mixed = ["eval", "stats", str(folder), "--out", str(tmp_path / "mixed.npz"), *words[:2]]
    app(mixed, standalone_mode=False)
    assert "the pictures have 4 sizes" in capsys.readouterr().err
    assert found["store"].count == 4
    assert found["store"].made["side"] == "24"
    # The same set: the order of its rows, and so the rounding, may differ.
    torch.testing.assert_close(found["store"].mean_F, found["folder"].mean_F, rtol=1e-9, atol=1e-9)
    without = make_store(tmp_path / "without", rows=3)
    assert "does not keep the original pictures" in mistake(
        "eval", "stats", without.uri, "--out", tmp_path / "no.npz", *words
    )
    assert "--side is 0" in mistake("eval", "stats", folder, "--out", tmp_path / "no.npz", "--side", "0")


def test_a_reference_of_adm_holds_pictures_too(run: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (7, 24, 24, 3), dtype=np.uint8)
    batch = tmp_path / "batch.npz"
    np.savez(batch, arr_0=pictures, mu=np.zeros(1280), sigma=np.eye(1280))
    assert torch.equal(read_reference_pictures(batch)[3], torch.from_numpy(pictures[3]).permute(2, 0, 1))
    place = compared_with(batch)
    protocol = small("quick", "count=8", "metrics=[precision-recall-efflite0, fd-efflite0]", *place)
    result = evaluate(Evaluation(run, protocol, tmp_path / "eval", CPU, QUIET), QUIET)
    assert {"precision_efflite0", "recall_efflite0", "fd_efflite0"} == result.figures.keys() - {
        "density_efflite0",
        "coverage_efflite0",
    }
    np.savez(batch, arr_0=pictures.astype(np.float32))
    with pytest.raises(UserError, match="arr_0 is float32"):
        read_reference_pictures(batch)
    np.savez(batch, mu=np.zeros(2))
    with pytest.raises(UserError, match="holds no pictures"):
        read_reference_pictures(batch)


def test_a_judge_answers_questions(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    asked = [{"question": "a red circle", "category": "shape"}, {"question": "a blue heart", "needs": [0]}]
    file.write_text(json.dumps({"prompt": "a red circle", "questions": asked}) + "\n")
    protocol = small("dpg", f"prompts_file={file}", "judge=shapes")
    result = evaluate(Evaluation(run, protocol, tmp_path / "eval", CPU, QUIET), QUIET)
    assert result.figures.keys() == {"questions", "questions_all", "questions_shape"}
    assert len(result.scores["questions"]) == 4  # a picture of the prompt for each seed
    assert result.figures["questions"].value == np.mean(result.scores["questions"])


def test_pictures_that_are_not_finite_are_no_pictures(run: Path, tmp_path: Path, mistake) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    file = broken / "checkpoints/000000064/ema.safetensors"
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    save_file({name: value * torch.nan for name, value in load_file(file).items()}, file, about)
    said = mistake("eval", broken, "count=4", "micro_batch=4", "--out", tmp_path / "eval")
    assert "4 of 4 pictures have NaN or infinite values (the first one has seed 1, number 0)" in said


def test_without_held_out_pictures_the_rest_is_measured(tmp_path: Path) -> None:
    config = apply_overrides(parse_yaml(RECIPE), ["data.held_out=0"])
    assert train(config, tmp_path / "all", QUIET)
    result = evaluate(Evaluation(tmp_path / "all", small("demo"), tmp_path, CPU, QUIET), QUIET)
    assert {"retrieval_top1", "near_copies", "nearest_cosine", "diversity"} <= result.figures.keys()
    assert not {"kid_efflite0", "fd_efflite0", "loss", "near_copies_held_out"} & result.figures.keys()
    assert sum(text.startswith("left out: ") for text in result.warnings) == 4
