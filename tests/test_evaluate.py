"""``shoestring eval``: pictures by number, figures with what they depend on, mistakes."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import forks
from evaluations import CPU, QUIET, RECIPE, small
from shoestring.config import apply_overrides, parse_yaml
from shoestring.evaluation.alignment import clip_scores
from shoestring.evaluation.drawing import Wish, draw, picture_file, pictures_of, wishes
from shoestring.evaluation.features import HUB
from shoestring.evaluation.geneval import TASKS
from shoestring.evaluation.measures import Figure, TooFew, check_enough, check_not_degenerate
from shoestring.evaluation.protocol import Protocol, differences
from shoestring.evaluation.result import compared, read_result
from shoestring.runtime import UserError
from shoestring.sampling.generate import load_pipeline
from shoestring.studies.evaluate import Evaluation
from shoestring.studies.evaluate_figures import evaluate
from shoestring.studies.evaluate_page import write_page
from shoestring.studies.evaluate_sweep import Point, best, sweep
from shoestring.training.display import read_log, rows_of
from shoestring.training.folder import MACHINE
from shoestring.training.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert train(parse_yaml(RECIPE), folder, QUIET)
    return folder


# -- pictures ----------------------------------------------------------------------------------------------


def drawn(run: Path, folder: Path, micro_batch: int, shares: int = 1) -> Tensor:
    pipeline = load_pipeline(run, CPU)
    wanted = wishes(["a red circle", "", "two blue squares"], (1, 2, 3))
    for i in reversed(range(shares)):
        draw(pipeline, folder, wanted, pipeline.config.sampling, micro_batch, (i, shares))
    return pictures_of(folder, wanted)


def test_pictures_do_not_depend_on_the_number_of_processes(run: Path, tmp_path: Path) -> None:
    one = drawn(run, tmp_path / "one", 2)
    for shares in (2, 3):
        assert torch.equal(drawn(run, tmp_path / f"{shares}", 2, shares), one)


def test_pictures_hardly_depend_on_the_batch(run: Path, tmp_path: Path) -> None:
    one = drawn(run, tmp_path / "one", 1)
    for batch in (7, 64):
        apart = (drawn(run, tmp_path / f"{batch}", batch).int() - one.int()).abs()
        assert (apart <= 1).double().mean() >= 0.999


def test_pictures_that_are_there_are_kept_and_others_drawn_alike(run: Path, tmp_path: Path) -> None:
    first = drawn(run, tmp_path, 4)
    files = sorted(tmp_path.rglob("*.png"))
    assert len(files) == 9
    before = {file: file.stat().st_mtime_ns for file in files}
    files[3].unlink()
    files[4].write_bytes(b"")  # as a full disk leaves it
    again = drawn(run, tmp_path, 4)
    assert torch.equal(again, first)
    assert sum(file.stat().st_mtime_ns != before[file] for file in files) <= 8  # two batches of them
    with Image.open(picture_file(tmp_path, Wish(2, "", 3))) as picture:
        made = json.loads(picture.info["shoestring"])
    assert (made["prompt"], made["seed"], made["index"]) == ("two blue squares", 3, 2)


# -- evaluations -------------------------------------------------------------------------------------------


def test_an_evaluation_says_everything_and_is_not_done_twice(run: Path, tmp_path: Path) -> None:
    protocol = small("demo", "bootstrap=10")
    evaluation = Evaluation(run, protocol, tmp_path, CPU, QUIET)
    result = evaluate(evaluation, QUIET)
    assert result is not None
    figures = result.figures
    assert {
        "retrieval_top1",
        "kid_efflite0",
        "fd_efflite0",
        "fd_efflite0_floor",
        "near_copies",
    } <= figures.keys()
    assert figures["fd_efflite0"].low95 < figures["fd_efflite0"].value < figures["fd_efflite0"].high95
    assert figures["fd_efflite0_floor"].value < figures["fd_efflite0"].value
    kept = read_result(evaluation.folder)
    assert kept["facts"]["pictures"] == 40
    assert len(kept["nearest"]) == 40
    assert 0 < figures["diversity"].value < 1
    assert figures["nearest_cosine"].value < 1
    assert kept["facts"]["reference"]["pictures"] == 600
    assert set(kept["facts"]["extractors"]) == {"efficientnet-lite0"}
    assert Protocol.model_validate_json(json.dumps(kept["protocol"])) == protocol
    assert kept["model"]["images_seen"] == 64
    assert kept["facts"]["loss"] == {"pictures": 256}
    assert len(kept["curves"]["loss"]) == 6
    assert figures["loss"].value == pytest.approx(np.mean([loss for _, loss in kept["curves"]["loss"]]))
    recalls, precisions = zip(*kept["curves"]["precision_recall_efflite0"], strict=True)
    assert list(recalls) == sorted(recalls)
    assert list(precisions) == sorted(precisions)
    assert (evaluation.folder / "row.md").read_text().count("|") > 20
    page = write_page(evaluation, result).read_text()
    assert "fd_efflite0" in page
    assert "Nearest training pictures" in page
    assert "Lowest novelty" in page
    assert page.count("<svg") == 2
    pictures = {file: file.stat().st_mtime_ns for file in evaluation.pictures.rglob("*.png")}
    assert len(pictures) == 40
    again = Evaluation(run, protocol, tmp_path, CPU, QUIET)
    assert again.folder == evaluation.folder
    assert evaluate(again, QUIET).figures == figures
    other = Evaluation(run, small("demo", "metrics=[diversity]"), tmp_path, CPU, QUIET)
    assert other.folder != evaluation.folder, "of other settings, so that none overwrites the other"
    assert other.pictures == evaluation.pictures
    assert all(file.stat().st_mtime_ns == time for file, time in pictures.items())


def test_several_processes_draw_what_one_draws(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval", run, "--protocol", "shapes", "micro_batch=50"]
    for name, more in (("alone", []), ("shared", ["--nproc", 2])):
        done = forks.shoestring(*words, "--out", tmp_path / name, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    alone, shared = (read_result(next((tmp_path / name).glob("shapes-*"))) for name in ("alone", "shared"))
    assert alone["figures"] == shared["figures"]
    assert len(list((tmp_path / "alone" / "pictures").rglob("*.png"))) == 300
    for file in (tmp_path / "alone").rglob("*.png"):
        other = tmp_path / "shared" / file.relative_to(tmp_path / "alone")
        assert other.read_bytes() == file.read_bytes()


def test_shapeeval_judges_the_six_tasks(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoestring.studies.evaluate.SHAPE_PROMPTS", 3)
    evaluation = Evaluation(run, small("shapes"), tmp_path, CPU, QUIET)
    result = evaluate(evaluation, QUIET)
    assert len(evaluation.asked.wanted) == 18
    assert len(result.figures) == 7
    page = write_page(evaluation, result).read_text()
    assert "Highest shapeeval" in page
    assert "Lowest shapeeval" in page
    assert result.figures["shapeeval"].value == pytest.approx(
        np.mean([figure.value for name, figure in result.figures.items() if name != "shapeeval"])
    )


def test_alignment_by_networks_of_the_hub(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny ones with drawn weights: that they are asked the right things."""
    from test_detection import clip_folder, detector_folder

    clip, detector = clip_folder(tmp_path / "clip"), detector_folder(tmp_path / "detector")
    monkeypatch.setitem(HUB, "clip-vitl14", ("", 32, HUB["clip-vitl14"][2], 16, 16))
    monkeypatch.setattr("shoestring.evaluation.geneval.SIZES", dict.fromkeys(TASKS, 2))
    for change in (
        ["metrics=[clip-score]", "count=6", f"extractors={{clip-vitl14: {clip}}}"],
        [
            "metrics=[geneval]",
            "prompts=geneval",
            "count=null",
            f"extractors={{detector: {detector}, colours: {clip}}}",
        ],
    ):
        protocol = small("quick", "reference=none", *change)
        found = evaluate(Evaluation(run, protocol, tmp_path, CPU, QUIET), QUIET).figures
        if "clip_score_clip-vitl14" in found:
            figure = found["clip_score_clip-vitl14"]
            assert figure.low95 < figure.value < figure.high95
        else:
            assert set(found) == {"geneval", *(f"geneval_{task}" for task in TASKS)}


def test_clip_scores_are_cosines_of_rows() -> None:
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]])
    b = torch.tensor([[4.0, 3.0], [-2.0, 0.0], [0.0, 5.0]])
    assert clip_scores(a, b).tolist() == pytest.approx([96.0, 0.0, 100 / 2**0.5])
    with pytest.raises(ValueError, match="must agree"):
        clip_scores(a, b[:2])


def test_another_weights_file_is_another_result(run: Path, tmp_path: Path) -> None:
    ema, raw = (
        Evaluation(run, small("quick", "count=4", f"weights={name}"), tmp_path, CPU, QUIET)
        for name in ("ema", "weights")
    )
    assert ema.file.name == "ema.safetensors"
    assert raw.folder != ema.folder
    assert not differences(raw.facts, ema.facts)


# -- sweeps ------------------------------------------------------------------------------------------------


def test_a_sweep_finds_the_best_settings_from_the_same_noise(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoestring.studies.evaluate.SHAPE_PROMPTS", 2)
    # Colours of pictures as figures: they change with guidance and steps, and need no extractor.
    monkeypatch.setattr("shoestring.studies.evaluate_figures.Measuring._shapes", darkness)
    axes = {"guidance": ["1", "3"], "steps": ["1", "2"], "sampler": [], "weights": ["ema"]}
    folder, points = sweep(run, small("shapes"), axes, tmp_path, CPU, QUIET)
    assert len(points) == 4
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [(row["guidance"], row["steps"]) for row in rows] == [
        ("1", "1"),
        ("1", "2"),
        ("3", "1"),
        ("3", "2"),
    ]
    values = [float(row["darkness"]) for row in rows]
    assert len(set(values)) == 4
    lowest = points[values.index(min(values))]
    assert best(points, "darkness") == lowest
    card = json.loads((run / "card.json").read_text())["shapes"]["guidance, steps, weights"]["best"]
    card = card["darkness"]
    assert card == {**lowest.settings, "value": min(values)}
    page = (folder / "sweep.html").read_text()
    assert page.count("rgba(") == 4
    assert "lower is better" in page
    with pytest.raises(UserError, match="needs values of at least one of --guidance, --steps"):
        sweep(run, small("shapes"), {}, tmp_path, CPU, QUIET)
    with pytest.raises(UserError, match=r"sampling.steps is 0"):
        sweep(run, small("shapes"), {"steps": ["0"]}, tmp_path, CPU, QUIET)


def darkness(self, pictures: Sequence[Tensor], result) -> dict[str, Figure]:
    return {"darkness": Figure(255 - torch.stack(list(pictures)).double().mean().item())}


def test_higher_is_better_for_some_figures() -> None:
    points = [Point({"steps": str(i)}, {"recall": i / 10, "fid": float(i)}) for i in range(3)]
    assert best(points, "recall") == points[2]
    assert best(points, "fid") == points[0]


# -- may they be compared? ---------------------------------------------------------------------------------


def test_results_are_compared_only_if_they_may_be(run: Path, tmp_path: Path) -> None:
    found = []
    for change in ("seeds=[1]", "seeds=[2]"):
        evaluation = Evaluation(run, small("quick", "count=12", change), tmp_path, CPU, QUIET)
        evaluate(evaluation, QUIET)
        found.append(read_result(evaluation.folder))
    a, c = found
    b = a | {"model": {"name": "another"}}
    assert compared(a, b)[0].startswith("Comparable")
    assert len(compared(a, b)) == 1 + len(a["figures"])
    assert compared(a, c)[0].startswith("Not comparable: prompts: ")
    assert "seeds: [1] and [2]" in compared(a, c)[0]
    d = a | {"protocol": a["protocol"] | {"metrics": ["kid-efflite0"], "weights": "power-0.1", "name": "own"}}
    assert compared(a, d)[0].startswith("Comparable"), "other metrics and weights do not matter"
    e = a | {"facts": a["facts"] | {"extractors": {"efficientnet-lite0": "another"}}}
    assert "extractors.efficientnet-lite0" in compared(a, e)[0]
    with pytest.raises(UserError, match="is no result of shoestring eval"):
        read_result(tmp_path)
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(UserError, match="lacks protocol, facts or figures"):
        read_result(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError, match="lacks protocol, facts or figures"):
        read_result(tmp_path)


# -- while training ----------------------------------------------------------------------------------------


def test_quality_while_training_changes_nothing_and_is_in_the_log(run: Path, tmp_path: Path) -> None:
    often = ["logging.kid_nimg=32", "logging.kid_pictures=20"]
    config = apply_overrides(parse_yaml(RECIPE), often)
    (tmp_path / "watched").mkdir()  # the kernels that a machine times and takes are those of the other run
    shutil.copy(run / MACHINE, tmp_path / "watched")
    assert train(config, tmp_path / "watched", QUIET)
    rows = rows_of(read_log(tmp_path / "watched"), "evaluation")
    assert [row["nimg"] for row in rows] == [32, 64]
    assert all(row["pictures"] == row["real_pictures"] == 20 and row["held_out"] for row in rows)
    assert rows[0]["kid_efflite0"] != rows[1]["kid_efflite0"]
    newest = "checkpoints/000000064/weights.safetensors"
    assert load_file(tmp_path / "watched" / newest).keys() == load_file(run / newest).keys()
    for name, value in load_file(tmp_path / "watched" / newest).items():
        assert torch.equal(value, load_file(run / newest)[name])


def test_too_few_pictures_and_copies(run: Path, tmp_path: Path) -> None:
    check_enough("fid", 2, None, only_moments=True)
    with pytest.raises(TooFew, match=r"needs at least 10 pictures, there are 3; .* be computed: fid, sfid"):
        check_enough("is", 3, None)
    with pytest.raises(TooFew, match="holds only their mean and covariance"):
        check_enough("precision-recall", 50, None, only_moments=True)
    check_enough("precision-recall", 50, 4)
    with pytest.raises(TooFew, match="needs at least 6 real pictures, there are 5"):
        check_enough("precision-recall", 50, 5, neighbours=5)
    # Of several metrics, those that can be computed are; the others are named.
    metrics = "metrics=[precision-recall-efflite0, kid-efflite0]"
    result = evaluate(Evaluation(run, small("quick", "count=3", metrics), tmp_path, CPU, QUIET), QUIET)
    assert {"kid_efflite0", "kid_efflite0_floor"} == result.figures.keys()
    assert "left out: metric precision-recall-efflite0 needs at least 4" in result.warnings[0]
    alone = small("quick", "count=3", "metrics=[precision-recall-efflite0]")
    with pytest.raises(UserError, match="needs at least 4 pictures, there are 3"):
        evaluate(Evaluation(run, alone, tmp_path / "alone", CPU, QUIET), QUIET)
    assert not (tmp_path / "alone").exists(), "said before anything is drawn"
    rows = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]])
    assert check_not_degenerate(rows, "pictures drawn") == "1 of 3 pictures drawn are exact copies of others"
    assert "one and the same" in check_not_degenerate(rows[:2], "pictures drawn")
    assert check_not_degenerate(rows[1:], "pictures drawn") is None
