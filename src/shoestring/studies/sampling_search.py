"""Which guidance scales to measure: few, where the curve has one valley."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def coarse_to_fine(scales: Sequence[float], measure: Callable[[float], float]) -> list[float]:
    """Find the best of some scales without measuring all.

    The ends and one between them are measured, then the neighbours of the best, until both of them are known.
    If the coarse values do not fall and then rise, the curve has more than one valley, and all scales are
    measured.

    Args:
        scales: rising.
        measure: gives the value of a scale; lower is better. Called once a scale.

    Returns:
        The scales that were measured, in this order.
    """
    count = len(scales)
    found: dict[int, float] = {}
    for i in sorted({0, (count - 1) // 2, count - 1}):
        found[i] = measure(scales[i])
    coarse = [found[i] for i in sorted(found)]
    if not one_valley(coarse):
        for i in range(count):
            if i not in found:
                found[i] = measure(scales[i])
        return [scales[i] for i in found]
    while True:
        best = min(found, key=lambda i: found[i])
        missing = [i for i in (best - 1, best + 1) if 0 <= i < count and i not in found]
        if not missing:
            return [scales[i] for i in found]
        for i in missing:
            found[i] = measure(scales[i])


def one_valley(values: Sequence[float]) -> bool:
    """Whether values fall, and then rise (either may be missing)."""
    lowest = min(range(len(values)), key=lambda i: values[i])
    falling = all(a >= b for a, b in zip(values[:lowest], values[1 : lowest + 1], strict=True))
    rising = all(a <= b for a, b in zip(values[lowest:], values[lowest + 1 :], strict=False))
    return falling and rising
