"""Plans as tables for people; every figure says where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from shoestring.planning.cost import Machine, Measured, StageCost
from shoestring.planning.fits import Fit
from shoestring.planning.machines import GPUS, USABLE
from shoestring.planning.published import PublishedRun
from shoestring.planning.run import RunPlan


def plan_table(run: RunPlan, published_gflop: Mapping[str, float]) -> Table:
    """A plan for people: one column a stage, one row a quantity, each with where it comes from.

    Args:
        run: the plan.
        published_gflop: training GFLOP of one image by name of the stage, as far as published.

    Returns:
        The table.
    """
    title = f"{run.name}: {run.parameters:,} parameters, {run.active:,} active per token"
    table = _table(title, (*(stage.name for stage in run.stages), "run"))
    stages = run.stages

    def row(label: str, values: Iterable[str], whole: str = "", last: bool = False) -> None:
        table.add_row(label, *values, whole, end_section=last)

    row("images", [_many(stage.nimg) for stage in stages], _many(sum(stage.nimg for stage in stages)))
    row("pixels a side", [str(stage.resolution) for stage in stages])
    row("patches", [str(stage.patches) for stage in stages])
    row("of which visible", [f"{stage.visible:.1%}" for stage in stages], last=True)
    for unit, per in (("Gflops", 1e9), ("Gmacs", 2e9)):
        row(f"forward {unit} (counted)", [_figure(stage.flops.forward / per) for stage in stages])
        row(f"training {unit} (counted)", [_figure(stage.flops.training / per) for stage in stages])
    one_hot = [_figure(stage.one_hot.training / 1e9) for stage in stages if stage.one_hot is not None]
    if one_hot:
        row("training Gflops, one-hot (counted)", one_hot)
    if published_gflop:
        known = [published_gflop.get(stage.name) for stage in stages]
        row("training Gflops (published)", ["" if value is None else f"{value:g}" for value in known])
    table.add_section()
    prefix, per = next(((x, p) for x, p in (("E", 1e18), ("P", 1e15)) if run.training >= p), ("T", 1e12))
    totals = [f"{stage.training / per:,.4g}" for stage in stages]
    row(f"all training {prefix}flops (counted)", totals, f"{run.training / per:,.4g}")
    table.caption = (
        "Gflops and Gmacs of one image. flops: 2 per multiply-accumulate (mac), in matrix products; "
        "training: forward and backward, recomputation not counted"
        + (f"; captions of {run.caption_tokens} tokens" if run.caption_tokens else "")
        + ("; one-hot: experts as in the released code" if one_hot else "")
    )
    return table


def _table(title: str, columns: Iterable[str], first: str = "") -> Table:
    """Words on the left, figures on the right."""
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _figure(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _many(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


def memory_table(fits: Sequence[Fit], title: str) -> Table:
    """What one GPU holds: one column a stage.

    Args:
        fits: of every stage.
        title: of the table.

    Returns:
        The table.
    """
    table = _table(title, [fit.stage for fit in fits])

    def gigabytes(value: float) -> str:
        return f"{value / 1e9:,.3g}" if value < 1e11 else f"{value / 1e9:,.0f}"

    def row(label: str, values: Iterable[str], last: bool = False) -> None:
        table.add_row(label, *values, end_section=last)

    row("images at once", [f"{fit.micro_batch} ({fit.source})" for fit in fits], last=True)
    for name in ("weights", "gradients", "moments", "averages", "activations", "workspace"):
        label = "moments of the optimiser" if name == "moments" else name
        row(f"GB {label}", [gigabytes(getattr(fit.plain, name)) for fit in fits])
    for name in ("activations", "workspace"):
        row(f"GB {name}, blocks recomputed", [gigabytes(getattr(fit.recomputed, name)) for fit in fits])
    table.add_section()
    for kind in fits[0].totals:
        for name, index in ((kind, 0), (f"{kind}, blocks recomputed", 1)):
            cells = []
            for fit in fits:
                total = fit.totals[kind][index]
                cells.append(gigabytes(total) + ("" if total <= fit.available else " too much"))
            row(f"GB at the worst moment, {name}", cells)
    table.caption = (
        "predicted, for steps that are not compiled; GB are 1e9 bytes. The parts are those of "
        f"{next(iter(fits[0].totals))}; the worst moment is below their sum, as gradients grow while "
        f"activations shrink. Too much: more than the {gigabytes(fits[0].available)} GB of a GPU that a plan "
        "fills"
    )
    return table


def cost_table(
    run: RunPlan,
    machine: Machine,
    costs: Sequence[StageCost],
    flops: str,
    measured: Sequence[Measured] | None,
) -> Table:
    """Hours and dollars: one column a stage.

    Args:
        run: the plan.
        machine: what the prediction is for.
        costs: predicted, of every stage.
        flops: where the FLOPs come from: counted or published.
        measured: what steps that were run here come to; ``None`` = none were.

    Returns:
        The table.
    """
    title = f"{machine.count} x {machine.gpu.title}"
    table = _table(title, (*(cost.name for cost in costs), "run"))
    whole = sum(cost.flops for cost in costs)
    table.add_row(
        f"share of the FLOPs ({flops})",
        *(f"{cost.flops / whole:.0%}" for cost in costs),
        "",
        end_section=True,
    )

    def rows(costs: Sequence[StageCost], label: str) -> None:
        hours = [cost.hours for cost in costs]
        table.add_row(f"images/s ({label})", *(f"{cost.images_per_s:,.4g}" for cost in costs), "")
        table.add_row(f"hours ({label})", *map(_figure, hours), _figure(sum(hours)))
        table.add_row(f"days ({label})", *(f"{h / 24:.2f}" for h in hours), f"{sum(hours) / 24:.2f}")
        usd = [cost.usd for cost in costs if cost.usd is not None]
        if usd:
            table.add_row(f"dollars ({label})", *(f"{value:,.2f}" for value in usd), f"{sum(usd):,.2f}")

    rows(costs, "predicted")
    table.add_section()
    if measured is None:
        table.add_row("images/s here", *("not measured" for _ in costs), "")
    else:
        rows([each.cost for each in measured], "measured here")
        memory = [each.memory_bytes for each in measured]
        table.add_row(
            "GB at the worst moment (measured here)",
            *("not measured" if value is None else f"{value / 1e9:,.3g}" for value in memory),
            "",
        )
    by_side: dict[int, float] = {}
    for stage, cost in zip(run.stages, costs, strict=True):
        by_side[stage.resolution] = by_side.get(stage.resolution, 0.0) + cost.flops
    sides = ", ".join(f"{side} pixels {part / whole:.0%}" for side, part in by_side.items())
    table.caption = (
        f"predicted: assuming {machine.mfu:.1%} of the peak of {machine.gpu.peak_flops / 1e12:,.0f} TFLOP/s "
        f"(bf16, dense, data sheet) in all stages; share of the FLOPs: {sides}"
        + ("" if machine.usd_per_gpu_hour is not None else "; dollars: with --price")
        + (
            ""
            if measured is None
            else "; measured here: steps of this machine, carried over to the whole run"
        )
    )
    return table


def gpu_table(flops: float, machine: Machine, needed: float) -> Table:
    """The whole run on every GPU of the list.

    Args:
        flops: of the run.
        machine: whose number of GPUs and share of the peak count for all.
        needed: bytes on each GPU.

    Returns:
        The table.
    """
    table = _table(
        "The same on other GPUs",
        ("peak TFLOP/s", "GB", f"hours on {machine.count} (predicted)", "holds it"),
        "GPU",
    )
    for name, each in GPUS.items():
        hours = Machine(each, machine.count, machine.mfu).hours(flops)
        holds = "yes" if needed <= each.memory_bytes * USABLE else "no"
        peak = f"{each.peak_flops / 1e12:,g}"
        table.add_row(f"{name:7} {each.title}", peak, f"{each.memory_bytes / 1e9:g}", _figure(hours), holds)
    table.caption = (
        "peak: bf16, dense, and memory by the vendors' data sheets (published); hours: assuming "
        f"{machine.mfu:.1%} of each peak, which not every GPU reaches; holds it: the images at once of the "
        "table above, in the way that needs least (predicted)"
    )
    return table


def published_table(
    report: PublishedRun, stages: Sequence[str], accounts: Mapping[tuple[str, bool], Sequence[StageCost]]
) -> Table:
    """A published run beside our account of it.

    Args:
        report: what was published.
        stages: their names.
        accounts: our hours by short name of the GPU and whether from counted FLOPs.

    Returns:
        The table.
    """
    table = _table("The published run", (*stages, "run"))
    for name, time in report.times.items():
        where = f"{time.gpus} x {GPUS[name].title}"
        table.add_row(f"days, {where} (published)", *(f"{d:g}" for d in time.days), f"{time.total_days:g}")
        for counted, source in ((False, "published"), (True, "counted")):
            days = [cost.hours / 24 for cost in accounts[name, counted]]
            label = f"days, {time.utilisation:.1%} of peak, {source} FLOPs (predicted)"
            table.add_row(label, *(f"{d:.2f}" for d in days), f"{sum(days):.2f}", end_section=counted)
    table.add_row("dollars (published)", *(f"{v:,g}" for v in report.usd), f"{report.total_usd:,g}")
    usd = [cost.usd or 0.0 for cost in accounts[report.priced, False]]
    label = f"dollars at {report.usd_per_gpu_hour:g} for a GPU-hour (predicted)"
    table.add_row(label, *(f"{v:,.0f}" for v in usd), f"{sum(usd):,.0f}")
    table.caption = "; ".join(report.comparisons) + f" (published: {report.source})"
    return table
