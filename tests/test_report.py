"""The report: one self-contained page, for a whole run and for a short one."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from shoestring.runtime import UserError
from shoestring.studies.charts import Band, Line, line_chart
from shoestring.studies.report import ReportData, write_report

VOID = {"meta", "img", "br", "line", "rect", "circle", "polyline"}


class Page(HTMLParser):
    """Text, pictures and addresses of a page; fails on tags that are not closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def log_lines(steps: int = 60) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(1, steps + 1):
        masked = i <= 40
        rows.append({
            "kind": "train", "nimg": 100 * i, "step": i, "stage": "deferred" if masked else "dense",
            "loss": 1 / i + 0.1, "lr": 1e-3, "mask_ratio": 0.5 if masked else 0.0, "grad_norm": 1.0,
            "images_per_s": 300.0 if masked else 200.0, "peak_share": 0.5 if masked else None,
            "elapsed_s": i / 3, "cost_usd": i * 1e-4,
        })  # fmt: skip
        if i % 20 == 0:
            levels = {"0.1": 0.2, "1.0": 0.4, "10.0": 1.0 / i}
            rows.append({"kind": "validation", "nimg": 100 * i, "loss": 0.3, "loss_per_level": levels})
    return rows


METRICS: dict[str, float | None] = {
    "train_s": 372.4, "total_s": 553.0, "images_per_s": 261.2, "peak_memory_gb": 2.31,
    "fd_efflite0": 212.34, "fd_efflite0_floor": 160.8, "drawn_n": 800, "fd_floor_n": 400,
    "fd_reference_n": 100,
    "kid_efflite0": 0.0412, "kid_efflite0_floor": 0.0013, "kid_efflite0_spread": 0.004,
    "retrieval_top1": 0.53, "retrieval_top1_low95": 0.481, "retrieval_top1_high95": 0.579,
    "retrieval_top5": 0.81, "retrieval_chance_top5": 0.0125, "retrieval_captions": 400,
    "near_copies": 31, "near_copies_held_out": 4, "held_out_n": 100,
}  # fmt: skip


@pytest.fixture
def data() -> ReportData:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "green").save(buffer, "PNG")
    return ReportData(
        title="demo <1>",
        summary="A small model & 400 captions.",
        prompts=[("red apple", Image.new("RGB", (32, 32), "red"), True), ("<b>", buffer.getvalue(), False)],
        sample_command='shoestring sample runs/demo --prompt "red apple"',
        train_command="shoestring train demo data.source=folder data.path=my_pics",
        config_yaml="name: demo\nseed: 0\n",
        log=log_lines(),
        metrics=METRICS,
        history=[(1000 * i, Image.new("RGB", (128, 128), (20 * i, 0, 0))) for i in range(11)],
        history_captions=("red apple", "<i>"),
        machine={"date": "2026-01-02", "torch": "2.13.0"},
        credit="OpenMoji (https://openmoji.org), CC BY-SA 4.0.",
    )


def test_whole_run(tmp_path: Path, data: ReportData) -> None:
    path = write_report(tmp_path, data)
    assert path == tmp_path / "report.html"
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    # Self-contained: pictures inside, links only to the credit and within the page, no scripts.
    assert "<script" not in source
    assert "url(" not in source
    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(images) == 2 + 8
    assert all(value.startswith("data:image/") for value in images)
    assert {value for _, name, value in page.attributes if name == "href"} == {
        "https://openmoji.org",
        "#config",
    }
    # Captions are text, not markup.
    assert ("img", "alt", "<b>") in page.attributes
    assert "<b>" in page.text
    assert "<i>" in page.text
    # Never-seen captions are marked.
    assert source.count('class="sample unseen"') == 1
    assert "1 of the 2 captions" in page.text
    # The figures.
    for piece in (
        "6 min 12 s", "9 min 13 s", "6,000", "2.31 GB", "$0.01", "212", "161 train against held-out",
        "0.0412 ± 0.004", "53 % (48 % to 58 %)", "81 %", "1.2 % by chance", "31 of 800", "4 of 100 held-out",
        "mostly bias",
        "here 800 pictures, and 400 for the floor, against 100",
        "name: demo", "2026-01-02", "10,000 images seen",
        '--prompt "red apple"', "data.path=my_pics", "fd_floor_n: 400",
    ):  # fmt: skip
        assert piece in page.text, piece
    assert page.text.count("measured here") >= 8
    # Stages: 40 masked steps of 100 images, then 20 dense ones; both named in the charts.
    stages = re.findall(r"<tr><td>(deferred|dense)</td>(.*?)</tr>", source)
    cells = {name: re.findall("<td>(.*?)</td>", rest) for name, rest in stages}
    assert cells["deferred"][:5] == ["50 % masked", "4,000", "13 s", "300", "50 %"]
    assert cells["dense"][:5] == ["unmasked", "2,000", "6.7 s", "200", "not measured"]
    assert source.count(">50 % masked</text>") == source.count(">unmasked</text>") == 4
    assert source.count('class="band"') == 4
    assert "σ 0.1" in page.text


@pytest.mark.parametrize("lines", [0, 1, 2])
def test_short_run(tmp_path: Path, data: ReportData, lines: int) -> None:
    short = replace(data, log=log_lines(lines), metrics={}, history=(), history_captions=(), machine={})
    page = Page(write_report(tmp_path, short).read_text(encoding="utf-8"))
    assert "nan" not in page.text.lower()
    assert "How good it is" not in page.text
    assert ("How it learnt" in page.text) == (lines > 0)


def test_missing_and_broken_figures(tmp_path: Path, data: ReportData) -> None:
    metrics = {"fd_efflite0": 200.0, "kid_efflite0": float("nan"), "retrieval_top5": None, "near_copies": 3}
    log = [*log_lines(), {"kind": "train", "nimg": 7000, "loss": float("nan")}, {"kind": "sample", "nimg": 3}]
    page = Page(write_report(tmp_path, replace(data, metrics=metrics, log=log)).read_text(encoding="utf-8"))
    assert "FD-EffLite0200not measured" in page.text
    assert "KID, same" not in page.text
    assert "retrieval top" not in page.text
    assert "kid_efflite0: not measured" in page.text
    assert not re.search(r"\bnan\b", page.text)


def test_no_price_no_cost(tmp_path: Path, data: ReportData) -> None:
    free = [{**row, "cost_usd": 0.0} for row in log_lines()]
    page = Page(write_report(tmp_path, replace(data, log=free)).read_text(encoding="utf-8"))
    assert "no price set" in page.text
    assert "It cost" not in page.text


def test_oracle(tmp_path: Path, data: ReportData) -> None:
    page = Page(write_report(tmp_path, data).read_text(encoding="utf-8"))
    assert "Right by the oracle" not in page.text
    metrics = {**METRICS, "oracle_single_shape": 0.83, "oracle_held_out": 0.0, "oracle_n": 400}
    page = Page(write_report(tmp_path, replace(data, metrics=metrics)).read_text(encoding="utf-8"))
    assert "single shape83 %" in page.text
    assert "held out0 %" in page.text
    assert "n400" in page.text


def test_large_pictures_stay_small(tmp_path: Path, data: ReportData) -> None:
    noise = Image.effect_noise((512, 512), 80).convert("RGB")
    large = replace(data, prompts=[("noise", noise, True)] * 12)
    assert write_report(tmp_path, large).stat().st_size < 3_000_000


def test_after_a_resume_the_later_line_holds(tmp_path: Path, data: ReportData) -> None:
    again = [{**row, "loss": 0.5, "stage": "dense"} for row in log_lines()[-10:] if row["kind"] == "train"]
    source = write_report(tmp_path, replace(data, log=[*log_lines(), *again])).read_text(encoding="utf-8")
    rows = re.findall(r"<tr><td>dense</td>.*?</tr>", source)
    assert len(rows) == 1
    assert "<td>0.5</td>" in rows[0]


def test_bad_input_is_named(tmp_path: Path, data: ReportData) -> None:
    with pytest.raises(UserError, match="picture of the report cannot be read"):
        write_report(tmp_path, replace(data, prompts=[("a", b"not a picture", True)]))
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report(tmp_path / "file", data)


def coordinates(chart: str) -> list[tuple[float, float]]:
    text = re.findall(r'points="([^"]*)"', chart)[0]
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split())]


def ticks(chart: str) -> list[tuple[float, float]]:
    """Value and height of the marks of the y axis."""
    found = re.findall(r'class="tick end" x="[^"]*" y="([^"]*)">([^<]*)<', chart)
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}
    return [
        (float(text.split()[0]) * (scale[text.split()[1]] if " " in text else 1), float(y) - 4)
        for y, text in found
    ]


@given(st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=30), st.booleans())
@example([1.0, 9.0], False)
@example([0.3, 7e5], False)
@settings(max_examples=60)
def test_points_lie_where_the_axis_says(values: list[float], from_zero: bool) -> None:
    chart = line_chart([Line("a", list(enumerate(values)), "red")], [], "x", "y", from_zero)
    marks = ticks(chart)
    heights = [y for _, y in marks]
    assert heights == sorted(heights, reverse=True)
    assert 2 <= len(marks) <= 16
    for value, (_, y) in zip(values, coordinates(chart), strict=True):
        # Marks below the value are drawn below it (y grows downwards; labels are rounded to 3 digits).
        assert all(height >= y - 0.2 for mark, height in marks if mark < value * 0.998)
        assert all(height <= y + 0.2 for mark, height in marks if mark > value * 1.002)
        assert heights[-1] - 0.2 <= y <= heights[0] + 0.2


def test_chart_details() -> None:
    assert line_chart([Line("a", [(0, float("nan"))], "red")], [Band(0, 1, "b", True)], "x", "y") == ""
    line = Line("loss", [(float(i), 2.0 + i) for i in range(5)], "red")
    chart = line_chart([line], [Band(0, 3, "one", True), Band(3, 3.1, "narrow", False)], "x", "y")
    assert [y for _, y in coordinates(chart)] == [y for _, y in ticks(chart)]
    assert coordinates(chart)[2][0] == pytest.approx(sum(x for x, _ in coordinates(chart)) / 5, abs=0.06)
    assert chart.count("<rect") == 1
    assert ">one<" in chart
    assert ">narrow<" not in chart
    assert "logarithmic" not in chart
    wide = Line("loss", [(float(i), 10.0**i) for i in range(5)], "red")
    assert "y, logarithmic" in line_chart([wide], [], "x", "y")
    heights = [y for _, y in coordinates(line_chart([wide], [], "x", "y"))]
    steps = [a - b for a, b in zip(heights, heights[1:], strict=False)]
    assert max(steps) - min(steps) < 0.3
    long = Line("", [(float(i), float(i % 2)) for i in range(4000)], "red")
    thinned = coordinates(line_chart([long], [], "x", "y", from_zero=True))
    assert len(thinned) == 400
    # Each is the mean of five zeros and five ones, and the axis ends at such a value.
    assert {y for _, y in thinned} == {ticks(line_chart([long], [], "x", "y", from_zero=True))[-1][1]}
