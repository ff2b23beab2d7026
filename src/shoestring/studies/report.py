"""The report of a run: one self-contained HTML page with pictures, curves, measures and their provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from shoestring.runtime import write_text
from shoestring.studies.charts import Band, Line, line_chart, smoothed
from shoestring.studies.page import (
    HERE,
    Metrics,
    Picture,
    dollars,
    embedded,
    finite,
    floor_text,
    html_table,
    metric,
    percent,
    raw,
    short,
    table_row,
    whole,
    with_links,
    with_unit,
)
from shoestring.studies.report_template import (
    COMMANDS,
    COPIES,
    FRECHET,
    KID,
    LOSS,
    ORACLE,
    PAGE,
    PROVENANCE,
    RETRIEVAL,
    STAGES,
)
from shoestring.training.display import duration, rows_of

MAX_FRAMES = 8

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ReportData:
    """What goes into a report. Whatever is empty or missing is left out of the page or called not measured.

    ``metrics`` is the content of ``metrics.json``. The page knows ``train_s``, ``total_s``, ``cost_usd``,
    ``images_per_s``, ``peak_share``, ``peak_memory_gb``, ``parameters``, ``training_captions``,
    ``fd_efflite0``, ``kid_efflite0`` (each with ``_floor``; ``kid_efflite0_spread``), the numbers of pictures
    ``drawn_n``, ``fd_reference_n`` and ``fd_floor_n``, retrieval, ``near_copies_held_out`` of ``held_out_n``
    and everything that starts with ``oracle_`` or ``shapeeval``; the others are in the complete list at its
    end.
    """

    title: str
    summary: str
    """One sentence: what the model is and what it learnt from."""
    prompts: Sequence[tuple[str, Picture, bool]]
    """Sample grid: caption, picture (PIL or the bytes of a PNG), whether the caption was trained on."""
    sample_command: str
    """Shell command that makes a picture of one's own words."""
    train_command: str
    """Shell command that trains on one's own pictures."""
    config_yaml: str
    log: Sequence[Row] = ()
    """Lines of the run's ``log.jsonl``; other kinds than ``train``, ``validation`` and
    ``evaluation`` are passed over."""
    metrics: Metrics = field(default_factory=dict)
    history: Sequence[tuple[int, Picture]] = ()
    """Sample grids over training: images seen, grid of the same prompts."""
    history_captions: Sequence[str] = ()
    """Captions of the pictures of a grid, in reading order."""
    machine: Mapping[str, str] = field(default_factory=dict)
    """Facts of provenance in the order shown: date, machine, threads, torch, seed, commit."""
    credit: str = ""
    """Credit and licence of the data; addresses become links."""


def write_report(run_dir: Path, data: ReportData) -> Path:
    """Write ``report.html`` into the run folder.

    Args:
        run_dir: the run's folder.
        data: what to show.

    Returns:
        Path of the page.

    Raises:
        UserError: if the file cannot be written or a picture cannot be read.
    """
    train = _by_progress(data.log, "train")
    stages = _stages(train)
    body = "\n".join(
        part
        for part in (
            _headline(data, train),
            _samples(data.prompts),
            _film(data.history, data.history_captions),
            _curves(train, _by_progress(data.log, "validation"), rows_of(data.log, "evaluation"), stages),
            _measures(data.metrics),
            _oracle(data.metrics),
            _commands(data),
            _provenance(data),
        )
        if part
    )
    path = run_dir / "report.html"
    write_text(path, PAGE.substitute(title=escape(data.title), body=body, credit=with_links(data.credit)))
    return path


def _headline(data: ReportData, train: Sequence[Row]) -> str:
    m = data.metrics
    train_s, total_s, cost = metric(m, "train_s"), metric(m, "total_s"), metric(m, "cost_usd")
    if train:
        train_s = train[-1]["elapsed_s"] if train_s is None else train_s
        cost = train[-1]["cost_usd"] if cost is None else cost
    sentence = [escape(data.summary)]
    if train_s is not None:
        sentence.append(f"Training from random weights took {duration(train_s)} on this machine.")
    if total_s is not None:
        sentence.append(f"The whole run, from data to this page, took {duration(total_s)}.")
    if cost:
        sentence.append(f"It cost {dollars(cost)}.")
    tiles = [
        ("training", duration(train_s)),
        ("images seen", f"{train[-1]['nimg']:,}" if train else None),
        ("parameters", whole(metric(m, "parameters"))),
        ("training captions", whole(metric(m, "training_captions"))),
        ("images a second", short(metric(m, "images_per_s"))),
        ("of the machine's matmul peak", percent(metric(m, "peak_share"))),
        ("peak memory", with_unit(short(metric(m, "peak_memory_gb")), " GB")),
        ("cost", dollars(cost) if cost else "no price set"),
    ]
    cards = "".join(
        f'<div class="tile"><b>{text}</b><span>{name}</span></div>' for name, text in tiles if text
    )
    hint = (
        ""
        if cost
        else " A price of the machine (<code>logging.usd_per_hour</code>) would give the cost in dollars."
    )
    return (
        f'<p class="lead">{" ".join(sentence)}</p>\n<div class="tiles">{cards}</div>\n'
        f'<p class="note">{HERE} All figures on this page come from this one run.{hint}</p>'
    )


def _samples(prompts: Sequence[tuple[str, Picture, bool]]) -> str:
    if not prompts:
        return ""
    cells = []
    for caption, picture, seen in prompts:
        source, width, _ = embedded(picture)
        shown = width * max(1, 128 // width)
        kind, crisp = ("sample" if seen else "sample unseen"), (' class="pixels"' if width < 128 else "")
        text = escape(caption)
        cells.append(
            f'<figure class="{kind}" style="--w:{min(shown, 256)}px"><img{crisp} src="{source}" alt="{text}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    unseen = sum(not seen for _, _, seen in prompts)
    note = (
        f"{unseen} of the {len(prompts)} captions, framed and marked "
        '<span class="badge"></span>, were kept out of training with all their pictures.'
        if unseen
        else "The model was trained on all of these captions."
    )
    return (
        f"<h2>What it draws</h2>\n<p>One picture a caption, the prompts fixed before training. {note}</p>\n"
        f'<div class="samples">{"".join(cells)}</div>\n'
        f'<p class="note">{HERE} Not picked: one seed, first try.</p>'
    )


def _film(history: Sequence[tuple[int, Picture]], captions: Sequence[str]) -> str:
    if not history:
        return ""
    last = len(history) - 1
    count = min(len(history), MAX_FRAMES)
    chosen = sorted({round(i * last / max(1, count - 1)) for i in range(count)})
    frames, wide = [], False
    for index in chosen:
        nimg, picture = history[index]
        source, width, height = embedded(picture)
        wide = width > 3 * height
        shown = width * max(1, (880 if wide else 300) // width)
        crisp = ' class="pixels"' if width < 400 else ""
        frames.append(
            f'<figure class="frame" style="--w:{shown}px">'
            f'<img{crisp} src="{source}" alt="samples at {nimg} images">'
            f"<figcaption>{nimg:,} images seen</figcaption></figure>"
        )
    names = f" The prompts, in reading order: {escape(', '.join(captions))}." if captions else ""
    return (
        f"<h2>While it learnt</h2>\n<p>The same prompts at {len(chosen)} moments of training.</p>\n"
        f'<div class="film{" rows" if wide else ""}">{"".join(frames)}</div>\n'
        f'<p class="note">{HERE}{names}</p>'
    )


def _curves(
    train: Sequence[Row],
    validation: Sequence[Row],
    evaluation: Sequence[Row],
    stages: Sequence[Sequence[Row]],
) -> str:
    if not train:
        return ""
    starts = [0, *(stage[-1]["nimg"] for stage in stages[:-1])]
    bands = [
        Band(start, stage[-1]["nimg"], _masking(stage), shaded=max(r["mask_ratio"] for r in stage) > 0)
        for start, stage in zip(starts, stages, strict=True)
    ]
    smooth = [point for stage in stages for point in smoothed([(r["nimg"], r["loss"]) for r in stage])]
    loss = [
        Line("", [(r["nimg"], r["loss"]) for r in train], "var(--a)", faint=True),
        Line("training, smoothed", smooth, "var(--a)"),
        Line("validation", [(r["nimg"], r["loss"]) for r in validation], "var(--b)", dots=True),
    ]
    levels = sorted({level for r in validation for level in r.get("loss_per_level", {})}, key=float)
    per_level = [
        Line(
            f"σ {float(level):.3g}",
            [(r["nimg"], r["loss_per_level"][level]) for r in validation if _has_level(r, level)],
            f"color-mix(in oklab, var(--high) {100 * i / max(1, len(levels) - 1):.0f}%, var(--low))",
            dots=True,
        )
        for i, level in enumerate(levels)
    ]
    speed = [Line("", [(r["nimg"], r["images_per_s"]) for r in train], "var(--a)")]
    rate = [Line("", [(r["nimg"], r["lr"]) for r in train], "var(--a)")]
    kid = [Line("", [(r["nimg"], r["kid_efflite0"]) for r in evaluation], "var(--b)", dots=True)]
    x = "images seen"
    cards = [
        ("Loss", line_chart(loss, bands, x, "loss"),
         LOSS),
        ("Validation by noise level", line_chart(per_level, bands, x, "loss"),
         "Held-out pictures under pinned noise, one line a noise level."),
        ("KID of samples", line_chart(kid, bands, x, "KID") if evaluation else "",
         "Of a few samples to held-out pictures, features of EfficientNet-Lite0."),
        ("Throughput", line_chart(speed, bands, x, "images a second", from_zero=True),
         "Forward, loss, backward, clipping, optimiser and weight average."),
        ("Learning rate", line_chart(rate, bands, x, "learning rate", from_zero=True), "Of AdamW."),
    ]  # fmt: skip
    charts = "".join(
        f'<div class="card"><h3>{name} {HERE}</h3>{chart}<p class="note">{note}</p></div>'
        for name, chart, note in cards
        if chart
    )
    return f'<h2>How it learnt</h2>\n<div class="charts">{charts}</div>\n{_stage_table(stages, starts)}'


def _stage_table(stages: Sequence[Sequence[Row]], starts: Sequence[int]) -> str:
    rows, before_s = [], 0.0
    for start, stage in zip(starts, stages, strict=True):
        last = stage[-1]
        shares = [r["peak_share"] for r in stage if finite(r.get("peak_share"))]
        speed = median(r["images_per_s"] for r in stage)
        cells = [
            escape(str(last["stage"])), _masking(stage), f"{last['nimg'] - start:,}",
            duration(last["elapsed_s"] - before_s), short(speed),
            percent(median(shares)) if shares else "not measured",
            f"{smoothed([(r['nimg'], r['loss']) for r in stage])[-1][1]:.4g}",
        ]  # fmt: skip
        before_s = last["elapsed_s"]
        rows.append(table_row(cells))
    head = (
        "stage",
        "patches",
        "images",
        "time",
        "images a second",
        "share of matmul peak",
        "loss at its end",
    )
    return html_table("The stages", head, rows) + f'<p class="note">{STAGES}</p>'


def _measures(m: Metrics) -> str:
    rows: list[Sequence[str]] = []
    notes: list[str] = []
    for add in (_distances, _retrieval, _near_copies):
        add(m, rows, notes)
    if not rows:
        return ""
    head = ("measure", "samples", "floor, chance or base rate", "")
    cells = html_table("The samples, measured", head, [table_row(row) for row in rows])
    return f"<h2>How good it is</h2>\n{cells}" + "".join(f'<p class="note">{note}</p>' for note in notes)


def _distances(m: Metrics, rows: list[Sequence[str]], notes: list[str]) -> None:
    frechet, kid = metric(m, "fd_efflite0"), metric(m, "kid_efflite0")
    if frechet is not None:
        rows.append(("FD-EffLite0", short(frechet), floor_text(m, "fd_efflite0_floor"), "lower is better"))
        counts = [metric(m, key) for key in ("drawn_n", "fd_floor_n", "fd_reference_n")]
        known = all(n is not None for n in counts)
        drawn, floor, held = map(whole, counts)
        at = f" (here {drawn} pictures, and {floor} for the floor, against {held})" if known else ""
        notes.append(FRECHET.format(at=at))
    if kid is not None:
        std = metric(m, "kid_efflite0_spread")
        value = short(kid) if std is None else f"{short(kid)} ± {std:.2g}"
        rows.append(("KID, same features", value, floor_text(m, "kid_efflite0_floor"), "lower is better"))
        notes.append(KID)


def _retrieval(m: Metrics, rows: list[Sequence[str]], notes: list[str]) -> None:
    for k in (1, 5):
        share, chance = metric(m, f"retrieval_top{k}"), metric(m, f"retrieval_chance_top{k}")
        low, high = metric(m, f"retrieval_top{k}_low95"), metric(m, f"retrieval_top{k}_high95")
        if share is not None:
            interval = "" if low is None or high is None else f" ({percent(low)} to {percent(high)})"
            by_chance = "not measured" if chance is None else f"{percent(chance)} by chance"
            rows.append((f"retrieval top-{k}", percent(share) + interval, by_chance, "higher is better"))
    pictures, captions = metric(m, "drawn_n"), metric(m, "retrieval_captions")
    if rows and pictures is not None and captions is not None:
        notes.append(RETRIEVAL.format(pictures=whole(pictures), captions=f" of {whole(captions)} captions"))


def _near_copies(m: Metrics, rows: list[Sequence[str]], notes: list[str]) -> None:
    copies, pictures = metric(m, "near_copies"), metric(m, "drawn_n")
    others, held_out = metric(m, "near_copies_held_out"), metric(m, "held_out_n")
    if copies is not None:
        found = whole(copies) if pictures is None else f"{whole(copies)} of {whole(pictures)}"
        known = others is not None and held_out is not None
        base = f"{whole(others)} of {whole(held_out)} held-out pictures" if known else "not measured"
        rows.append(("near-copies", found, base, "fewer is more inventive"))
        notes.append(COPIES)


def _oracle(m: Metrics) -> str:
    rows = []
    for key in m:
        value = metric(m, key)
        if key.startswith(("oracle_", "shapeeval")) and value is not None:
            text = whole(value) if key.endswith("_n") or value > 1 else percent(value)
            rows.append(table_row([escape(key.removeprefix("oracle_").replace("_", " ")), text]))
    if not rows:
        return ""
    return f"<h2>Right by the oracle</h2>\n<p>{ORACLE}</p>\n" + html_table(
        "Accuracy", ("prompts", "right"), rows
    )


def _commands(data: ReportData) -> str:
    return COMMANDS.format(sample=escape(data.sample_command), train=escape(data.train_command))


def _provenance(data: ReportData) -> str:
    rows = [table_row([escape(name), escape(value)]) for name, value in data.machine.items()]
    rows.append(table_row(["configuration", '<a href="#config">every setting of the run</a>']))
    listing = "\n".join(f"{name}: {raw(value)}" for name, value in sorted(data.metrics.items()))
    return PROVENANCE.format(
        here=HERE,
        rows="".join(rows),
        config=escape(data.config_yaml),
        metrics=f"<details><summary>All metrics</summary><pre>{escape(listing)}</pre></details>"
        if listing
        else "",
    )


def _by_progress(log: Sequence[Row], kind: str) -> list[Row]:
    """Lines of one kind that have a loss, by images seen."""
    return [row for row in rows_of(log, kind) if finite(row.get("loss"))]


def _stages(train: Sequence[Row]) -> list[list[Row]]:
    return [list(rows) for _, rows in groupby(train, key=lambda row: row["stage"])]


def _has_level(row: Row, level: str) -> bool:
    return finite(row.get("loss_per_level", {}).get(level))


def _masking(stage: Sequence[Row]) -> str:
    first, last = stage[0]["mask_ratio"], stage[-1]["mask_ratio"]
    if first == last:
        return f"{percent(first)} masked" if first else "unmasked"
    return f"{percent(first)} to {percent(last)} masked"
