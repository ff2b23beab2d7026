"""The scaling study's downstream part: networks of all sizes go on to another task, and are compared again.

``shoestring study downstream FOLDER --task superres`` takes the networks of a sampling study, teaches each
to enlarge pictures, and measures the quality at many steps; ``--task distill`` makes students of few steps
and puts them beside the undistilled rows of the study; ``--task dreambooth`` teaches all one subject.

Source: Bigger is not Always Better, arXiv 2404.01367, sections 3.2, 3.3 and 4.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from rich.console import Console

from shoestring.adapt.distill import Distilling, distill_recipe
from shoestring.adapt.dreambooth import Training
from shoestring.adapt.subject import GRID, SubjectJob, learn_subject
from shoestring.adapt.superres import superres_recipe
from shoestring.config import RunConfig, SuperResConfig, apply_overrides
from shoestring.models.files import find_model, read_header
from shoestring.planning import plan as count
from shoestring.runtime import UserError, say, write_text
from shoestring.studies.charts import COLORS, Line, line_chart
from shoestring.studies.page import embedded, html_table, table_row
from shoestring.studies.report_template import PAGE
from shoestring.studies.sampling_analysis import Scale, at_the_end, best_within, better, budgets, most_samples
from shoestring.studies.sampling_cost import Plan, Study
from shoestring.studies.sampling_models import Model
from shoestring.studies.sampling_recipes import MEASURED, PRESETS
from shoestring.studies.sampling_report import write_report
from shoestring.studies.sampling_rows import Row, read_rows
from shoestring.training.folder import checkpoint_folders
from shoestring.training.loop import train

Task = Literal["superres", "distill", "dreambooth"]
TASKS: tuple[Task, ...] = ("superres", "distill", "dreambooth")
STEPS: dict[str, tuple[int, ...]] = {"superres": (4, 6, 8, 10, 20, 50, 100), "distill": (1, 2, 4, 8)}
SAMPLER = {"superres": "ddim", "distill": "consistency"}
FEW = 20
"""Steps up to which the paper finds small networks ahead in super-resolution."""


@dataclass(frozen=True)
class DownstreamJob:
    """What to do; see ``shoestring study downstream --help``."""

    study: Path
    """Folder of a sampling study."""
    task: Task
    family: str
    sizes: int
    """How many, evenly over the family's costs, its ends among them."""
    nimg: int
    batch: int
    lr: float
    factor: int
    """Of super-resolution."""
    pictures: Path | None
    """DreamBooth: of the subject."""
    class_words: str
    steps: tuple[int, ...]
    samples: int
    changes: tuple[str, ...]
    """Settings of the recipes, as key=value."""
    train_only: bool
    out: Path


@dataclass(frozen=True)
class Base:
    """A network of the sampling study."""

    name: str
    seed: int
    folder: Path
    gflops: float


def run_downstream(job: DownstreamJob, console: Console) -> bool:
    """Do the job.

    Args:
        job: what to do.
        console: where a person reads.

    Returns:
        False after an interruption.

    Raises:
        UserError: if the study has too few networks, or a setting is wrong.
    """
    rows = most_samples(read_rows(job.study / "results.parquet"))
    bases = _chosen(_bases(job.study, job.family), job.sizes)
    if job.task == "dreambooth":
        return _learn_subject(job, bases, console)
    models = []
    for i, base in enumerate(bases):
        config = _recipe(job, base)
        folder = job.out / "models" / f"{base.name}-s{base.seed}"
        say(console, f"[{i + 1}/{len(bases)}] {job.task}: {base.name}, seed {base.seed}")
        done = [int(each.name) for each in checkpoint_folders(folder)]
        if (not done or max(done) < config.nimg) and not train(config, folder, console):
            return False
        family = job.family if job.task == "superres" else f"{job.family} distilled"
        models.append(Model(config.name, family, base.seed, folder, on_the_way=job.task == "superres"))
    if job.train_only:
        return True
    plan = Plan(
        samplers=(SAMPLER[job.task],),
        steps=job.steps or STEPS[job.task],
        guidance=(1.0,),
        samples=job.samples,
        metric="fd" if job.task == "superres" else "kid",
        full=True,
    )
    study = Study(PRESETS["cifar10"], plan, job.out, None, (), False, console)
    study.models = models
    if not study.run():
        return False
    found = most_samples(study.rows())
    beside = at_the_end([row for row in rows if row.family == job.family]) if job.task == "distill" else []
    say(console, f"Tables and figures: {write_page(job, [*beside, *found], plan.metric)}")
    return True


def _learn_subject(job: DownstreamJob, bases: Sequence[Base], console: Console) -> bool:
    """Teach the subject to every network, and put the figures side by side."""
    if job.pictures is None or not job.class_words.strip():
        raise UserError(
            "--task dreambooth needs the pictures of a subject and what it is: give --pictures and --class"
        )
    found: list[tuple[Base, Path, dict[str, Any]]] = []
    for i, base in enumerate(bases):
        folder = job.out / "models" / f"{base.name}-s{base.seed}"
        say(console, f"[{i + 1}/{len(bases)}] {job.task}: {base.name}, seed {base.seed}")
        training = Training(None, 64, 1.0, job.nimg, job.batch, job.lr, base.seed)
        subject = SubjectJob(
            base=base.folder,
            pictures=job.pictures,
            class_words=job.class_words,
            token=None,
            template="a {}",
            training=training,
            name=f"{base.name}-dreambooth",
            folder=folder,
            changes=job.changes,
        )
        figures = learn_subject(subject, console)
        if figures is None:
            return False
        found.append((base, folder, figures))
    page = write_subject_page(job.out, found)
    say(console, f"Table and pictures: {page}")
    return True


def write_subject_page(out: Path, found: Sequence[tuple[Base, Path, dict[str, Any]]]) -> Path:
    """How near the subject came, by size.

    Args:
        out: folder of the page.
        found: networks, their run folders and the figures of ``fidelity.json``.

    Returns:
        Path of the page.
    """
    body, figures = [], []
    for base, folder, each in found:
        values = [each["subject"][when] for when in ("before", "after", "gain")]
        cells = [f"{base.name}, seed {base.seed}", f"{base.gflops:.3g}"]
        cells += [f"{value['mean']:.3f} +- {value['spread']:.3f}" for value in values]
        cells.append(f"{each['class_kept']['mean']:.3f}")
        cells.append(f"{each['ordinary_kept']['mean']:.3f}" if "ordinary_kept" in each else "not measured")
        body.append(table_row(list(map(escape, cells))))
        if base.seed == 0 and (folder / GRID).is_file():
            with Image.open(folder / GRID) as picture:
                source, width, _ = embedded(picture)
            figures.append(
                f'<h2>{escape(base.name)}</h2><figure class="frame" style="--w:{width}px">'
                f'<img class="pixels" alt="before and after" src="{source}"></figure>'
            )
    head = ["network", "GFLOP an evaluation", "similarity before", "after", "gain"]
    head += ["class pictures kept", "other prompts kept"]
    first = [(base, each) for base, _, each in found if base.seed == 0]
    line = Line("", [(b.gflops, each["subject"]["gain"]["mean"]) for b, each in first], COLORS[0], dots=True)
    chart = line_chart([line], (), "GFLOP an evaluation", "gain in similarity to the subject", log_x=True)
    about = (
        f"{len(found)} networks learned the same subject by all weights; similarity is the cosine of "
        f"{found[0][2]['extractor']} features, mean and spread over noise seeds. Measured here."
    )
    parts = [f'<p class="lead">{escape(about)}</p>', html_table("By size", head, body)]
    parts += [f'<div class="charts"><div class="card">{chart}</div></div>', *figures]
    page = out / "report.html"
    write_text(page, PAGE.substitute(title="A subject, by size", body="\n".join(parts), credit=""))
    return page


def _bases(study: Path, family: str) -> list[Base]:
    """The finished networks of a study's family, the smallest first."""
    found = []
    for folder in sorted((study / "models").glob("*-s*")):
        name, _, seed = folder.name.rpartition("-s")
        if not checkpoint_folders(folder) or not seed.isdigit():
            continue
        config = read_header(find_model(folder)).config
        if config.model.kind == family and read_header(find_model(folder)).facts.nimg >= config.nimg:
            found.append(Base(name, int(seed), folder, _gflops(config)))
    sizes = len({base.name for base in found})
    if sizes < 2:
        raise UserError(
            f"{study} has {sizes} finished network{'s' * (sizes != 1)} of kind {family} in "
            "models/; two sizes or more are needed: run shoestring study sampling first"
        )
    return sorted(found, key=lambda base: (base.gflops, base.seed))


def _gflops(config: RunConfig) -> float:
    return count(config).stages[-1].flops.forward / 1e9


def _chosen(bases: Sequence[Base], sizes: int) -> list[Base]:
    """So many sizes evenly over the logarithm of the cost; all seeds of the ends, the first of the others."""
    names = list(dict.fromkeys(base.name for base in bases))
    cost = {base.name: math.log(base.gflops) for base in bases}
    low, high = cost[names[0]], cost[names[-1]]
    count = min(sizes, len(names))
    kept = {names[0], names[-1]}
    for i in range(1, count - 1):
        aim = low + i * (high - low) / (count - 1)
        kept.add(min((n for n in names if n not in kept), key=lambda n: abs(cost[n] - aim)))
    ends = {names[0], names[-1]}
    return [base for base in bases if base.name in kept and (base.seed == 0 or base.name in ends)]


def _recipe(job: DownstreamJob, base: Base) -> RunConfig:
    if job.task == "superres":
        settings = SuperResConfig(factor=job.factor, degradation="bicubic")
        config = superres_recipe(base.folder, settings, base.name, job.nimg, job.batch, job.lr)
    else:
        asked = Distilling("consistency", 4, None, job.nimg, job.batch, job.lr)
        config = distill_recipe(base.folder, f"{base.name}-distilled", asked)
    share = round(job.nimg * MEASURED[0])
    kept = [f"logging.checkpoint_nimg={share}", f"logging.keep_checkpoints={round(1 / MEASURED[0]) + 2}"]
    return apply_overrides(config, [*kept, *job.changes])


# -- the page ----------------------------------------------------------------------------------------------


def write_page(job: DownstreamJob, rows: Sequence[Row], metric: str) -> Path:
    """Write the page: the charts of the sampling study, and a table that speaks to the paper's claim.

    Args:
        job: what was done.
        rows: of the task, and undistilled ones beside distilled ones.
        metric: by which networks are compared.

    Returns:
        Its path.
    """
    page = write_report(job.out, rows, metric, count_guidance=True, about=_about(job, rows))
    scale = Scale.of(rows, count_guidance=True)
    table = (
        few_or_many(rows, scale, metric) if job.task == "superres" else distilled_table(rows, scale, metric)
    )
    text = page.read_text(encoding="utf-8")
    write_text(page, text.replace("<h2>", f"{table}<h2>", 1))
    return page


def _about(job: DownstreamJob, rows: Sequence[Row]) -> str:
    trained = len({(row.model, row.seed) for row in rows})
    what = (
        f"super-resolution x{job.factor} of held-out pictures made small (bicubic), without guidance"
        if job.task == "superres"
        else "consistency distillation at the teachers' own guidance, beside the undistilled networks"
    )
    return f"{trained} networks: {what}; {rows[0].samples:,} pictures a cell. Measured here."


def few_or_many(rows: Sequence[Row], scale: Scale, metric: str) -> str:
    """Who wins at equal sampling cost with at most 20 steps, and with more: the paper's claim flips there."""
    final = [row for row in at_the_end(rows) if row.seed == 0]
    body = []
    tests: tuple[tuple[str, Callable[[Row], bool]], ...] = (
        (f"at most {FEW} steps", lambda row: row.steps <= FEW),
        (f"more than {FEW} steps", lambda row: row.steps > FEW),
    )
    for what, fits in tests:
        mine = [row for row in final if fits(row)]
        for cost in budgets(mine, scale, 6):
            winner = best_within(mine, scale, metric, cost)
            if winner is None:
                continue
            affordable = [row for row in mine if scale.sampling(row) <= cost * (1 + 1e-9)]
            largest = max(affordable, key=lambda row: row.gflops)
            rival = best_within([r for r in affordable if r.model == largest.model], scale, metric, cost)
            assert rival is not None
            cells = [what, f"{cost:g}", f"{winner.model}, {winner.steps} steps"]
            cells += [f"{getattr(winner, metric):.4g}", f"{rival.model}, {rival.steps} steps"]
            body.append(table_row(list(map(escape, [*cells, f"{getattr(rival, metric):.4g}"]))))
    head = ["steps", "sampling cost", "best", metric, "largest that can be afforded", metric]
    return html_table("Small or large at equal cost", head, body) if body else ""


def distilled_table(rows: Sequence[Row], scale: Scale, metric: str) -> str:
    """Every student at its steps beside the best undistilled sampling of its size that is as good."""
    final = [row for row in at_the_end(rows) if row.seed == 0]
    body = []
    for student in (row for row in final if row.model.endswith("-distilled")):
        size = student.model.removesuffix("-distilled")
        plain = [row for row in final if row.model == size]
        equal = best_within(plain, scale, metric, scale.sampling(student))
        as_good = [row for row in plain if better(metric)(row) <= better(metric)(student)]
        cheapest = min(as_good, key=scale.sampling, default=None)
        cells = [student.model, str(student.steps), f"{scale.sampling(student):.3g}"]
        cells.append(f"{getattr(student, metric):.4g}")
        cells.append("" if equal is None else f"{getattr(equal, metric):.4g} ({equal.sampler} {equal.steps})")
        if cheapest is None:
            cells.append("none measured is as good")
        else:
            times = scale.sampling(cheapest) / scale.sampling(student)
            cells.append(f"{times:.1f} ({cheapest.sampler} {cheapest.steps}, guidance {cheapest.guidance:g})")
        body.append(table_row(list(map(escape, cells))))
    head = [
        "student",
        "steps",
        "cost",
        metric,
        "undistilled at that cost",
        "cost of undistilled as good, times",
    ]
    return html_table("Distilled beside undistilled", head, body) if body else ""
