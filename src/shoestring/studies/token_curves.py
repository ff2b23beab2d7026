"""Quality along trainings, and how it is read off at equal images, FLOPs and wall time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from shoestring.studies.token_rows import Row

DENSE = "dense"
SETTINGS = ("-1024", "-flow")
"""Endings of cells that are compared with a dense cell of their own."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """KID of a cell along its training, mean over seeds."""

    cell: str
    group: str
    method: str
    ratio: float
    seeds: int
    parameters: int
    gflops_per_image: float
    s_per_image: float | None
    """Measured in turns on a quiet machine; ``None`` = not timed."""
    points: tuple[Row, ...]
    """Means over seeds, fewest images first."""
    spread: float
    """Standard deviation over seeds of the last KID; NaN for one seed."""
    diverged: int

    @property
    def last(self) -> Row:
        """The end of the training."""
        return self.points[-1]

    @property
    def setting(self) -> str:
        """What the cell must share with others to be compared: tokens and process."""
        return next((ending for ending in SETTINGS if self.cell.endswith(ending)), "")

    def over(self, axis: Callable[[Row], float | None]) -> list[Point]:
        """KID over an axis, where the axis is known."""
        return [(x, row.kid) for row in self.points if (x := axis(row)) is not None]


def images(row: Row) -> float:
    """Axis: images seen."""
    return float(row.nimg)


def gflops(row: Row) -> float:
    """Axis: training FLOPs, in units of 1e9."""
    return row.training_gflops


def at(points: Sequence[Point], x: float) -> float | None:
    """KID at a budget, between measured points: linear in the logarithms of both; never beyond them."""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= x <= x1 and x1 > x0:
            share = math.log(x / x0) / math.log(x1 / x0)
            if min(y0, y1) <= 0:
                return y0 + share * (y1 - y0)
            return math.exp(math.log(y0) + share * math.log(y1 / y0))
    return None


def curves(rows: Sequence[Row], timings: Mapping[str, float]) -> list[Curve]:
    """Group rows by cell, mean over seeds, without guidance.

    Args:
        rows: of the results file.
        timings: seconds an image, by cell.

    Returns:
        One curve a cell with any finished measurement, in the order of the file.
    """
    found = []
    for cell in dict.fromkeys(row.cell for row in rows):
        mine = [row for row in rows if row.cell == cell]
        plain = [row for row in mine if row.status == "ok" and row.guidance == 1]
        if not plain:
            continue
        fewest, last = min(row.samples for row in plain), max(row.nimg for row in plain)
        same = [row for row in plain if row.samples == fewest]
        # Seeds that got as far as any: a mean over others would change its members along the way.
        seeds = {row.seed for row in same if row.nimg == last}
        same = sorted((row for row in same if row.seed in seeds), key=lambda row: (row.nimg, row.seed))
        points = [_mean(list(group)) for _, group in groupby(same, key=lambda row: row.nimg)]
        most = [row for row in plain if row.nimg == last and row.samples > fewest and row.seed in seeds]
        final = [row for row in same if row.nimg == last]
        if {row.seed for row in most} == seeds:
            # KID does not depend on the number of samples; FD does, so it stays that of the smaller number.
            points[-1] = replace(_mean(most), fd=points[-1].fd)
            final = most
        first = plain[0]
        found.append(
            Curve(
                cell=cell,
                group=first.group,
                method=first.method,
                ratio=first.ratio,
                seeds=len(seeds),
                parameters=first.parameters,
                gflops_per_image=first.gflops_per_image,
                s_per_image=timings.get(cell),
                points=tuple(points),
                spread=statistics.stdev(row.kid for row in final) if len(final) > 1 else math.nan,
                diverged=sum(row.status == "diverged" for row in mine),
            )
        )
    return found


def _mean(rows: list[Row]) -> Row:
    def mean(name: str) -> float:
        return statistics.fmean(getattr(row, name) for row in rows)

    return replace(
        rows[0],
        kid=mean("kid"),
        kid_spread=mean("kid_spread"),
        fd=mean("fd"),
        loss=mean("loss"),
        trained_s=mean("trained_s"),
    )


def seconds(curve: Curve) -> Callable[[Row], float | None]:
    """Axis: training seconds, from the timing in turns; unknown without one."""

    def axis(row: Row) -> float | None:
        if curve.s_per_image is None or curve.gflops_per_image == 0:
            return None
        # A tail of other steps costs time in proportion to its FLOPs.
        return curve.s_per_image * row.training_gflops / curve.gflops_per_image

    return axis


def against_dense(curve: Curve, dense: Curve | None) -> tuple[float | None, float | None]:
    """KID of the cell over that of dense at the cell's whole budget: of FLOPs, and of time."""
    if dense is None:
        return None, None
    same_flops = at(dense.over(gflops), gflops(curve.last))
    time = seconds(curve)(curve.last)
    same_time = None if time is None else at(dense.over(seconds(dense)), time)
    return tuple(  # type: ignore[return-value]
        None if other is None or other <= 0 else curve.last.kid / other for other in (same_flops, same_time)
    )


def crossing(curve: Curve, dense: Curve, axis: str) -> float | None:
    """The budget at which the two curves cross, if they do between measured points.

    Args:
        curve: of a method.
        dense: to compare with.
        axis: ``images``, ``flops`` or ``time``.

    Returns:
        The smallest budget at which the order changes.
    """
    ours, theirs = (
        c.over({"images": images, "flops": gflops, "time": seconds(c)}[axis]) for c in (curve, dense)
    )
    if not ours or not theirs:
        return None
    low, high = max(ours[0][0], theirs[0][0]), min(ours[-1][0], theirs[-1][0])
    if low >= high:
        return None
    grid = [low * (high / low) ** (i / 200) for i in range(201)]
    differences = [(x, at(ours, x), at(theirs, x)) for x in grid]
    signs = [(x, a > b) for x, a, b in differences if a is not None and b is not None]
    for (_, before), (x, after) in zip(signs, signs[1:], strict=False):
        if before != after:
            return x
    return None


def dense_of(curve: Curve, found: Sequence[Curve]) -> Curve | None:
    """The dense cell of the same setting."""
    return next((c for c in found if c.cell == DENSE + curve.setting), None)
