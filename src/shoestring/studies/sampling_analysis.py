"""What the rows of a sampling-cost study say: best guidance, quality at a cost, fronts, who wins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shoestring.studies.sampling_rows import METRICS, Row


@dataclass(frozen=True)
class Scale:
    """How costs are counted: one network evaluation of the largest network is 1."""

    gflops: float
    count_guidance: bool
    """Whether guidance's second pass is counted; the paper does not mention it."""

    @staticmethod
    def of(rows: Sequence[Row], count_guidance: bool) -> Scale:
        """That of a study."""
        return Scale(max(row.gflops for row in rows), count_guidance)

    @property
    def axis(self) -> str:
        """Title of an axis of sampling costs."""
        return f"sampling cost, guidance's second pass {'counted' if self.count_guidance else 'not counted'}"

    def evaluation(self, row: Row) -> float:
        """Cost of one network evaluation."""
        return row.gflops / self.gflops

    def sampling(self, row: Row) -> float:
        """Cost of a picture: normalised cost of an evaluation x evaluations."""
        calls = row.guided_calls if self.count_guidance and row.guidance not in (0.0, 1.0) else 1
        return self.evaluation(row) * row.evaluations * calls


def better(metric: str) -> Callable[[Row], float]:
    """A key by which the best row is the least."""
    sign = -1 if METRICS[metric] else 1
    return lambda row: sign * float(getattr(row, metric))


def most_samples(rows: Sequence[Row]) -> list[Row]:
    """One row a cell: that of the newest weights, and of these with the most pictures.

    Args:
        rows: of a study, as they were written.

    Returns:
        In the order in which the cells first come.
    """
    newest = {(row.model, row.seed, row.nimg): row.digest for row in rows}
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        weights = row.model, row.seed, row.nimg
        cell = *weights, row.sampler, row.steps, row.guidance
        current = row.digest == newest[weights]
        if current and (cell not in found or row.samples > found[cell].samples):
            found[cell] = row
    return list(found.values())


def first_seeds(rows: Sequence[Row]) -> list[Row]:
    """Rows of every network's first training: that of the least seed."""
    least: dict[str, int] = {}
    for row in rows:
        least[row.model] = min(least.get(row.model, row.seed), row.seed)
    return [row for row in rows if row.seed == least[row.model]]


def at_the_end(rows: Sequence[Row]) -> list[Row]:
    """Rows of each network's last checkpoint."""
    last: dict[tuple[str, int], int] = {}
    for row in rows:
        key = row.model, row.seed
        last[key] = max(last.get(key, 0), row.nimg)
    return [row for row in rows if row.nimg == last[row.model, row.seed]]


def best_guidance(rows: Sequence[Row], metric: str) -> list[Row]:
    """The row with the best guidance of every network, sampler and number of steps.

    Guidance is chosen on the same pictures that it is judged by, as in the paper: the best of eight is a
    little better than it would be on new ones.

    Args:
        rows: of final checkpoints.
        metric: which decides.

    Returns:
        In the order in which the settings first come.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.seed, row.sampler, row.steps), []).append(row)
    return [min(group, key=better(metric)) for group in groups.values()]


def guidance_shown(best: Row, rows: Sequence[Row]) -> str:
    """The best scale of guidance as a table shows it: 8+ where it is the largest that was tried.

    Args:
        best: a row with the best guidance of its setting.
        rows: that it was chosen from.

    Returns:
        The scale; with a plus, a larger one may be better.
    """
    setting = best.model, best.seed, best.sampler, best.steps
    tried = {row.guidance for row in rows if (row.model, row.seed, row.sampler, row.steps) == setting}
    return f"{best.guidance:g}" + ("+" if len(tried) > 1 and best.guidance == max(tried) else "")


def best_at_costs(rows: Sequence[Row], scale: Scale, metric: str) -> list[Row]:
    """The best of every network, sampler, number of steps and cost, rising in cost.

    Where guidance's second pass is counted, scale 1 costs half of the others, and both stay.

    Args:
        rows: of final checkpoints.
        scale: of costs.
        metric: which decides.

    Returns:
        All that a curve over cost has to show.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in sorted(rows, key=scale.sampling):
        groups.setdefault((row.model, row.seed, row.sampler, row.steps, scale.sampling(row)), []).append(row)
    return [min(group, key=better(metric)) for group in groups.values()]


def front(rows: Sequence[Row], scale: Scale, metric: str) -> list[Row]:
    """Rows that no cheaper or equally dear one beats: the Pareto front, the cheapest first."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (scale.sampling(row), better(metric)(row))):
        if not found or better(metric)(row) < better(metric)(found[-1]):
            found.append(row)
    return found


def best_within(rows: Sequence[Row], scale: Scale, metric: str, cost: float) -> Row | None:
    """The best row that costs no more; ``None`` if all do."""
    affordable = [row for row in rows if scale.sampling(row) <= cost * (1 + 1e-9)]
    return min(affordable, key=better(metric), default=None)


def budgets(rows: Sequence[Row], scale: Scale, count: int = 10) -> list[float]:
    """Costs at which networks are compared: evenly on the logarithmic axis, each affordable to two or more.

    Args:
        rows: of final checkpoints.
        scale: of costs.
        count: how many at most.

    Returns:
        Rising costs, rounded to two digits.
    """
    least = sorted(
        min(scale.sampling(row) for row in rows if row.model == name) for name in {row.model for row in rows}
    )
    if len(least) < 2:
        return []
    low, high = least[1], max(scale.sampling(row) for row in rows)
    ratio = (high / low) ** (1 / (count - 1))
    return sorted({float(f"{low * ratio**i:.2g}") for i in range(count)})


def spread_of_seeds(rows: Sequence[Row], metric: str) -> dict[str, float]:
    """Largest difference of a figure between trainings that differ by their seed, by network."""
    found: dict[str, float] = {}
    groups: dict[tuple[str, int, str, int, float], list[float]] = {}
    for row in rows:
        setting = row.model, row.nimg, row.sampler, row.steps, row.guidance
        groups.setdefault(setting, []).append(float(getattr(row, metric)))
    for key, values in groups.items():
        if len(values) > 1:
            name = key[0]
            found[name] = max(found.get(name, 0.0), max(values) - min(values))
    return found


@dataclass(frozen=True)
class Curves:
    """Quality over training compute of checkpoints that were sampled alike."""

    setting: str
    """How all were sampled."""
    points: Mapping[str, Sequence[tuple[float, float]]]
    """By network, FLOP and quality, rising in FLOP."""


def training_curves(rows: Sequence[Row], metric: str) -> Curves:
    """Quality over training compute, with the sampling that most checkpoints have.

    Args:
        rows: of one seed a network, the metric finite.
        metric: lower is better.

    Returns:
        Of all networks that were sampled so.
    """
    settings: dict[tuple[str, int, float], set[tuple[str, int]]] = {}
    for row in rows:
        settings.setdefault((row.sampler, row.steps, row.guidance), set()).add((row.model, row.nimg))
    chosen = max(settings, key=lambda key: len(settings[key]))
    points: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda r: (r.family, r.gflops, r.nimg)):
        if (row.sampler, row.steps, row.guidance) == chosen:
            points.setdefault(row.model, []).append((row.training_gflops * 1e9, float(getattr(row, metric))))
    sampler, steps, guidance = chosen
    return Curves(f"{sampler}, {steps} steps, guidance {guidance:g}", points)
