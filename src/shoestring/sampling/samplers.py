"""All samplers by name: what each costs, its order, and one way to run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from shoestring.config import SamplingConfig
from shoestring.interfaces import Conditioning, Denoiser
from shoestring.sampling.ancestral import consistency, ddim
from shoestring.sampling.multistep import dpm_solver_2m, dpm_solver_2m_sde, dpm_solver_3m, unipc
from shoestring.sampling.singlestep import dpm_solver_2s, dpm_solver_3s
from shoestring.sampling.solvers import Level, Noise, OnStep, euler, heun
from shoestring.tensors import Float


@dataclass(frozen=True)
class Sampler:
    """A row of the table of samplers: exactly one of the functions is set."""

    order: int
    """Of the solver on the probability-flow ODE; 1 for those that draw noise."""
    ode: Callable[..., Tensor] | None = None
    """(denoiser, x, grid, conditioning, on_step)."""
    sde: Callable[..., Tensor] | None = None
    """The same, and the noise of every step."""
    calls_a_step: int = 1
    """Network evaluations of a step; the last one of a step into sigma 0 needs one only."""

    def calls(self, steps: int) -> int:
        """Network evaluations of one picture, guidance not counted."""
        return self.calls_a_step * (steps - 1) + 1


SAMPLERS = {
    "euler": Sampler(1, ode=euler),
    "heun": Sampler(2, ode=heun, calls_a_step=2),
    "ddim": Sampler(1, sde=ddim),
    "ddpm": Sampler(1, sde=ddim),
    "euler-ancestral": Sampler(1, sde=ddim),
    "dpmpp-2m": Sampler(2, ode=dpm_solver_2m),
    "dpmpp-3m": Sampler(3, ode=dpm_solver_3m),
    "dpmpp-2s": Sampler(2, ode=dpm_solver_2s),
    "dpmpp-3s": Sampler(3, ode=dpm_solver_3s),
    "dpmpp-2m-sde": Sampler(2, sde=dpm_solver_2m_sde),
    "unipc": Sampler(2, ode=unipc),
    "consistency": Sampler(1, sde=consistency),
}
"""``ddpm`` and ``euler-ancestral`` are ``ddim`` with eta 1: see there."""


def solve(
    denoiser: Denoiser,
    x: Float[Tensor, "B C H W"],
    grid: Sequence[Level],
    conditioning: Conditioning,
    sampling: SamplingConfig,
    noise: Noise,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C H W"]:
    """Run a sampler.

    Args:
        denoiser: estimates x0.
        x: noise scaled to ``grid[0]``.
        grid: (alpha, sigma) pairs, noisiest first, ending at (1, 0).
        conditioning: captions, best prepared.
        sampling: which sampler; its steps are those of the grid.
        noise: standard normal numbers of every step, for those that draw some.
        on_step: called after each step with its number and the current estimate of x0.

    Returns:
        Clean latents.
    """
    sampler = SAMPLERS[sampling.sampler]
    if sampler.ode is not None:
        return sampler.ode(denoiser, x, grid, conditioning, on_step)
    assert sampler.sde is not None
    more = {}
    if sampler.sde is ddim:
        more = {"eta": sampling.eta if sampling.sampler == "ddim" else 1.0}
    return sampler.sde(denoiser, x, grid, conditioning, on_step, noise, **more)


def lowered_order(sampling: SamplingConfig) -> str | None:
    """What to say where a sampler has too few steps for its order.

    The last step, into zero, is of first order for all, and before a step of order n there are n - 1 of lower
    order; Heun needs no step before it.

    Args:
        sampling: sampler and steps.

    Returns:
        A sentence, or ``None``.
    """
    order, steps = SAMPLERS[sampling.sampler].order, sampling.steps
    reached = min(order, max(1, steps if sampling.sampler == "heun" else steps - 1))
    if reached == order:
        return None
    return (
        f"{sampling.sampler} is of order {order}, but with {steps} step{'s' if steps > 1 else ''} it reaches "
        f"order {reached} (the last step is of order 1)"
    )
