"""Grids of noise levels for sampling, for any process.

A grid is a list of (alpha, sigma) pairs, the noisiest first, that ends at (1, 0). Some grids are made in the
noise-to-signal ratio sigma / alpha, which every process knows, others in the place of a level in a table of
so many timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from shoestring.runtime import UserError

ALIGN_YOUR_STEPS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
"""Noise-to-signal ratios of ten steps of Stable Diffusion 1.5, the last of which counts as zero.

Source: Align Your Steps, arXiv 2404.14507.
"""


def rho_grid(high: float, low: float, steps: int, rho: float) -> list[float]:
    """Even steps of ratio^(1 / rho): EDM's grid, elsewhere called Karras's. One step starts at ``high``.

    Args:
        high: first ratio.
        low: last ratio above zero.
        steps: how many ratios.
        rho: exponent; large = more steps at little noise.

    Returns:
        Falling ratios.

    Source: arXiv 2206.00364, equation 5.
    """
    first, last = high ** (1 / rho), low ** (1 / rho)
    return [(first + share * (last - first)) ** rho for share in _shares(steps)]


def log_snr_grid(high: float, low: float, steps: int) -> list[float]:
    """Even steps of the log-SNR; see :func:`rho_grid`."""
    return [math.exp(math.log(high) + share * math.log(low / high)) for share in _shares(steps)]


def table_grid(table: Sequence[float], steps: int) -> list[float]:
    """A table of ratios stretched to other numbers of steps: interpolated linearly in the logarithm.

    Args:
        table: falling ratios, one more than the steps it was made for: the last one counts as zero.
        steps: how many.

    Returns:
        Ratios without that last one.

    Source: arXiv 2404.14507, section 4.
    """
    found = []
    for i in range(steps):
        place = i * (len(table) - 1) / steps
        at = min(int(place), len(table) - 2)
        share = place - at
        found.append(math.exp((1 - share) * math.log(table[at]) + share * math.log(table[at + 1])))
    return found


def trailing_places(timesteps: int, steps: int) -> list[float]:
    """From the last entry of a table, in even steps (arXiv 2305.08891, table 2)."""
    return [timesteps * (1 - i / steps) - 1 for i in range(steps)]


def leading_places(timesteps: int, steps: int) -> list[float]:
    """Multiples of a whole number of entries, plus one: Stable Diffusion's; not from the last one."""
    return [float((steps - 1 - i) * (timesteps // steps) + 1) for i in range(steps)]


def uniform_places(timesteps: int, steps: int) -> list[float]:
    """From the last entry to the first, both among them."""
    return [(timesteps - 1) * (1 - share) for share in _shares(steps)]


PLACES: dict[str, Callable[[int, int], list[float]]] = {
    "trailing": trailing_places,
    "leading": leading_places,
    "uniform": uniform_places,
}


def check_steps(steps: int, timesteps: int, places: Callable[[int, int], list[float]]) -> None:
    """Refuse more steps than a table has entries.

    Args:
        steps: of the sampler.
        timesteps: entries.
        places: which grid.

    Raises:
        UserError: if there are more, or as many where an entry is skipped.
    """
    if steps > timesteps - (places is leading_places):
        raise UserError(
            f"sampling.steps is {steps}, but the process has {timesteps} timesteps; take fewer steps, or "
            "sampling.spacing=rho"
        )


def _shares(steps: int) -> list[float]:
    return [i / (steps - 1) if steps > 1 else 0.0 for i in range(steps)]
