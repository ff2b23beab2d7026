"""Noise processes, grids and samplers of shoestring, for inference with diffusers alone.

One language for all: xt = alpha x0 + sigma noise; a network becomes an estimate of x0 by four coefficients,
x0 = skip xt + out F(in xt, time). A grid is a list of (alpha, sigma) pairs from noise to (1, 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

Level = tuple[float, float]
Before = tuple[float, Tensor]
"""Length of a step in ln(alpha / sigma), and the estimate of x0 where it began."""
SMALLEST_ALPHA = 1e-6
ALIGN_YOUR_STEPS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
SAMPLERS = (
    *("heun", "euler", "ddim", "ddpm", "euler-ancestral", "dpmpp-2m", "dpmpp-3m", "dpmpp-2s", "dpmpp-3s"),
    *("dpmpp-2m-sde", "unipc", "consistency"),
)


def alphas_of(schedule: str, timesteps: int, zero_terminal_snr: bool) -> Tensor:
    """Alpha of every timestep of DDPM, in float64."""
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
    elif schedule == "scaled-linear":
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, timesteps, dtype=torch.float64).square()
    else:
        share = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        product = ((share + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - product[1:] / product[:-1]).clamp(max=0.999)
    alphas = (1 - betas).cumprod(0).sqrt()
    if zero_terminal_snr:
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    return alphas


def kept_share(level: Level, following: Level) -> float:
    """The share of x that a step keeps beside its scale: e^-h for a step of h in ln(alpha / sigma)."""
    return level[0] * following[1] / (following[0] * level[1])


def step_length(kept: float) -> float:
    """h; infinite from pure noise, and into sigma 0."""
    return -math.log(kept) if kept > 0 else math.inf


class ShoestringScheduler(SchedulerMixin, ConfigMixin):
    """The noise process of a model, its usual grid and sampler, and the other samplers of shoestring.

    A run: :meth:`set_timesteps`, then for every level of ``self.levels`` the estimate of x0 by
    :meth:`denoised`, guided, given to :meth:`step`. Solvers that call the network twice a step have more
    levels than steps.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        process: str = "edm",
        sigma_data: float = 0.5,
        flow_shift: float = 1.0,
        prediction: str = "epsilon",
        noise_schedule: str = "scaled-linear",
        num_train_timesteps: int = 1000,
        zero_terminal_snr: bool = False,
        sampler: str = "heun",
        steps: int = 30,
        eta: float = 0.0,
        spacing: str = "auto",
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigmas: list[float] | None = None,
    ) -> None:
        alphas = alphas_of(noise_schedule, num_train_timesteps, zero_terminal_snr)
        self.alpha_T, self.sigma_T = alphas, (1 - alphas.square()).sqrt()
        self.log_ratio_T = (self.sigma_T / alphas.clamp(min=SMALLEST_ALPHA)).log()
        self.set_timesteps(steps)

    # -- the process -----------------------------------------------------------------------------------

    def coefficients(self, alpha_B: Tensor, sigma_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Skip, out, in and the network's noise coordinate, one each a sample."""
        if self.config.process == "edm":
            data = self.config.sigma_data
            variance = (alpha_B * data).square() + sigma_B.square()
            time = (sigma_B / alpha_B.clamp(min=SMALLEST_ALPHA)).log() / 4
            return (
                alpha_B * data**2 / variance,
                sigma_B * data * variance.rsqrt(),
                variance.rsqrt(),
                time,
            )
        if self.config.process == "flow":
            total = alpha_B + sigma_B
            return 1 / total, -sigma_B / total, 1 / total, 1000.0 * sigma_B / total
        norm = (alpha_B.square() + sigma_B.square()).sqrt()
        alpha, sigma = alpha_B / norm, sigma_B / norm
        if self.config.prediction == "epsilon":
            inverse = 1 / alpha.clamp(min=SMALLEST_ALPHA)
            skip, out = inverse / norm, -sigma * inverse
        elif self.config.prediction == "v":
            skip, out = alpha / norm, -sigma
        else:
            skip, out = torch.zeros_like(alpha), torch.ones_like(alpha)
        return skip, out, 1 / norm, self._place(alpha, sigma)

    def _place(self, alpha_B: Tensor, sigma_B: Tensor) -> Tensor:
        """Where in the table of timesteps a level is; a whole number for the levels in it."""
        table = self.log_ratio_T.to(alpha_B.device)
        ratio = sigma_B.double() / alpha_B.double().clamp(min=SMALLEST_ALPHA)
        wanted = ratio.clamp(min=1e-30).log()
        after = (table[None, :] < wanted[:, None]).sum(dim=1).clamp(1, len(table) - 1)
        left, right = table[after - 1], table[after]
        place = after - 1 + ((wanted - left) / (right - left)).clamp(0, 1)
        whole = place.round()
        return torch.where((place - whole).abs() < 1e-2, whole, place).to(alpha_B)

    def denoised(self, network_output: Tensor, xt: Tensor, alpha_B: Tensor, sigma_B: Tensor) -> Tensor:
        """The estimate of x0, in float32."""
        skip, out, _, _ = self.coefficients(alpha_B, sigma_B)
        return skip[:, None, None, None] * xt + out[:, None, None, None] * network_output.to(xt.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, level: Level) -> Tensor:
        """Alpha x0 + sigma noise."""
        return level[0] * original_samples + level[1] * noise

    # -- the grid --------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str = "cpu",
        sampler: str | None = None,
    ) -> None:
        """Begin a run.

        ``levels`` are the levels at which the network is called in turn, and ``timesteps`` the same levels
        as the network sees them.
        """
        self.sampler = self.config.sampler if sampler is None else sampler
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}; choose from {', '.join(SAMPLERS)}")
        self.grid = self._grid(num_inference_steps or self.config.steps)
        self.num_inference_steps = len(self.grid) - 1
        calls = 2 if self.sampler == "heun" else 1
        repeated = [level for level in self.grid[1:-1] for _ in range(calls)]
        self.levels: list[Level] = [self.grid[0], *repeated]
        alphas, sigmas = (
            torch.tensor(values, dtype=torch.float64) for values in zip(*self.levels, strict=True)
        )
        self.timesteps = self.coefficients(alphas, sigmas)[3].float().to(device)
        self.init_noise_sigma = self.grid[0][1]
        self._index = 0
        self._begun: Any = None
        self._before: list[Before] = []
        self._found: list[Tensor] = []
        self._corrected_from: Any = None

    def _grid(self, steps: int) -> list[Level]:
        config = self.config
        spacing = config.spacing
        if spacing == "auto":
            spacing = "rho" if config.process == "edm" else "trailing"
        total = config.num_train_timesteps if config.process == "ddpm" else 1000
        shares = [i / (steps - 1) if steps > 1 else 0.0 for i in range(steps)]
        if spacing in ("trailing", "leading", "uniform"):
            places = {
                "trailing": [total * (1 - i / steps) - 1 for i in range(steps)],
                "leading": [float((steps - 1 - i) * (total // steps) + 1) for i in range(steps)],
                "uniform": [(total - 1) * (1 - share) for share in shares],
            }[spacing]
            return [*map(self._at_place, places), (1.0, 0.0)]
        least, most = self._ratios()
        high, low = min(most, config.sigma_max), max(least, config.sigma_min)
        if spacing == "rho":
            first, last = high ** (1 / config.rho), low ** (1 / config.rho)
            ratios = [(first + share * (last - first)) ** config.rho for share in shares]
        elif spacing == "log-snr":
            ratios = [math.exp(math.log(high) + share * math.log(low / high)) for share in shares]
        else:
            ratios = _stretched(config.sigmas or ALIGN_YOUR_STEPS, steps)
        return [*map(self._at_ratio, ratios), (1.0, 0.0)]

    def _ratios(self) -> Level:
        """The least and the greatest noise-to-signal ratio that the network was trained for."""
        if self.config.process != "ddpm":
            return 0.0, math.inf
        first, last = self.log_ratio_T[0].exp().item(), self.log_ratio_T[-1].exp().item()
        return first, last if self.alpha_T[-1] > 0 else math.inf

    def _at_place(self, place: float) -> Level:
        if self.config.process == "ddpm":
            nearest = min(len(self.alpha_T) - 1, round(place))
            return self.alpha_T[nearest].item(), self.sigma_T[nearest].item()
        t, shift = (place + 1) / 1000, self.config.flow_shift
        shifted = shift * t / (1 + (shift - 1) * t)
        return 1 - shifted, shifted

    def _at_ratio(self, ratio: float) -> Level:
        if self.config.process == "edm":
            return 1.0, ratio
        if self.config.process == "flow":
            return 1 - ratio / (1 + ratio), ratio / (1 + ratio)
        norm = (1 + ratio * ratio) ** -0.5
        return norm, ratio * norm

    # -- the samplers ----------------------------------------------------------------------------------

    def step(self, x0: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """From one level to the next.

        Args:
            x0: estimate of the clean latents at this level.
            sample: noisy latents.
            generator: draws the fresh noise of samplers that use some.

        Returns:
            The latents at the next level of ``levels``; clean ones at the end.
        """
        if self.sampler == "heun":
            return self._heun(x0, sample)
        level, following = self.grid[self._index], self.grid[self._index + 1]
        if self.sampler in ("dpmpp-2m", "dpmpp-3m"):
            ahead = self._multistep(x0, sample, level, following, 2 if self.sampler == "dpmpp-2m" else 3)
        elif self.sampler in ("dpmpp-2s", "dpmpp-3s"):
            ahead = self._singlestep(x0, sample, 2 if self.sampler == "dpmpp-2s" else 3)
        elif self.sampler == "unipc":
            ahead = self._unipc(x0, sample, level, following)
        elif self.sampler == "dpmpp-2m-sde":
            ahead = self._sde(x0, sample, level, following, generator)
        elif self.sampler == "consistency":
            ahead = following[0] * x0
            if following[1] > 0:
                ahead = ahead + following[1] * _noise_like(x0, generator)
        elif self.sampler == "euler":
            eps = (sample - level[0] * x0) / level[1]
            ahead = sample + (following[0] - level[0]) * x0 + (following[1] - level[1]) * eps
        else:
            eta = self.config.eta if self.sampler == "ddim" else 1.0
            ahead = _ancestral(x0, sample, level, following, eta, generator)
        self._index += 1
        return ahead

    def _heun(self, x0: Tensor, sample: Tensor) -> Tensor:
        level, following = self.grid[self._index], self.grid[self._index + 1]
        if self._begun is None:
            eps = (sample - level[0] * x0) / level[1]
            ahead = sample + (following[0] - level[0]) * x0 + (following[1] - level[1]) * eps
            if following[1] > 0:
                self._begun = (sample, x0, eps)
            else:
                self._index += 1
            return ahead
        x, x0_before, eps_before = self._begun
        eps = (sample - following[0] * x0) / following[1]
        self._begun = None
        self._index += 1
        d_alpha, d_sigma = following[0] - level[0], following[1] - level[1]
        return x + d_alpha * (x0_before + x0) / 2 + d_sigma * (eps_before + eps) / 2

    def _multistep(self, x0: Tensor, x: Tensor, level: Level, following: Level, order: int) -> Tensor:
        """DPM-Solver++ with the estimates of past steps (arXiv 2211.01095)."""
        kept = kept_share(level, following)
        h = step_length(kept)
        usable: list[Before] = []
        for before in [] if math.isinf(h) else self._before[: order - 1]:
            if math.isinf(before[0]):
                break
            usable.append(before)
        gained = following[0] * (1 - kept)
        ahead = following[1] / level[1] * x + gained * x0
        if usable:
            ratio, slope = usable[0][0] / h, (x0 - usable[0][1]) * (h / usable[0][0])
            if len(usable) == 1:
                ahead = ahead + gained / 2 * slope
            else:
                ratio_before = usable[1][0] / h
                slope_before = (usable[0][1] - usable[1][1]) / ratio_before
                bend = (slope - slope_before) / (ratio + ratio_before)
                slope = slope + ratio * bend
                of_slope, of_bend = 1 - (1 - kept) / h, 1 - 2 / h + 2 * (1 - kept) / h**2
                ahead = ahead + following[0] * (of_slope * slope + of_bend * bend)
        self._before = [(h, x0), *self._before[:1]]
        return ahead

    def _singlestep(self, x0: Tensor, x: Tensor, order: int) -> Tensor:
        """DPM-Solver++ in groups of steps, each from the group's start; the last step stands alone."""
        place, full = self._index, (self.num_inference_steps - 1) // order * order
        first = place - place % order if place < full else full
        if place == first or place == self.num_inference_steps - 1:
            first, self._begun, self._found = place, x, []
        self._found.append(x0)
        start, found = self.grid[first], self._found
        end = self.grid[place + 1]
        kept = kept_share(start, end)
        result = end[1] / start[1] * self._begun + end[0] * (1 - kept) * found[0]
        if len(found) == 1 or kept == 0:
            return result
        h, middle = step_length(kept), step_length(kept_share(start, self.grid[place]))
        slope = (found[-1] - found[0]) * (h / middle)
        if len(found) == 2:
            return result + end[0] * (1 - kept) / 2 * slope
        return result + end[0] * (1 - (1 - kept) / h) * slope

    def _sde(
        self, x0: Tensor, x: Tensor, level: Level, following: Level, generator: torch.Generator | None
    ) -> Tensor:
        kept = kept_share(level, following)
        h, forward = step_length(kept), x0
        if self._before and math.isfinite(h) and math.isfinite(self._before[0][0]):
            length, found = self._before[0]
            forward = x0 + (x0 - found) * (h / length) / 2
        x = following[1] / level[1] * kept * x + following[0] * (1 - kept**2) * forward
        if following[1] > 0:
            x = x + following[1] * math.sqrt(1 - kept**2) * _noise_like(x, generator)
        self._before = [(h, x0)]
        return x

    def _unipc(self, x0: Tensor, x: Tensor, level: Level, following: Level) -> Tensor:
        """2M predicts, the next estimate corrects (arXiv 2302.04867)."""
        if self._corrected_from is not None:
            start, x_before, x0_before, before = self._corrected_from
            x = _corrected(start, x_before, x0_before, before, level, x0)
        kept = kept_share(level, following)
        h = step_length(kept)
        last = self._before[0] if self._before else None
        usable = last if last is not None and math.isfinite(h + last[0]) else None
        gained = following[0] * (1 - kept)
        ahead = following[1] / level[1] * x + gained * x0
        if usable is not None:
            ahead = ahead + gained / 2 * (x0 - usable[1]) * (h / usable[0])
        self._corrected_from, self._before = (level, x, x0, usable), [(h, x0)]
        return ahead


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    where = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=where).to(x)


def _ancestral(
    x0: Tensor, x: Tensor, level: Level, following: Level, eta: float, generator: torch.Generator | None
) -> Tensor:
    """DDIM with a share of fresh noise (arXiv 2010.02502); with eta 1 DDPM's posterior."""
    eps = (x - level[0] * x0) / level[1]
    kept = kept_share(level, following)
    fresh = eta * following[1] * math.sqrt(1 - kept**2)
    x = following[0] * x0 + math.sqrt(following[1] ** 2 - fresh**2) * eps
    return x + fresh * _noise_like(x, generator) if fresh > 0 else x


def _corrected(
    start: Level, x: Tensor, x0: Tensor, before: Before | None, end: Level, arrived: Tensor
) -> Tensor:
    """The step from ``start`` to ``end`` once more, with the estimate at its end."""
    kept = kept_share(start, end)
    gained = end[0] * (1 - kept)
    result, change = end[1] / start[1] * x + gained * x0, arrived - x0
    if before is None or kept == 0:
        return result + gained / 2 * change
    h = step_length(kept)
    ratio = -before[0] / h
    phi_1 = -(1 - kept)
    phi_2 = -phi_1 / h - 1
    phi_3 = -phi_2 / h - 0.5
    first, second = phi_2 / phi_1, 2 * phi_3 / phi_1
    weight_before = (first - second) / (1 - ratio)
    slope_before = (before[1] - x0) / ratio
    return result + gained * (weight_before * slope_before + (first - weight_before) * change)


def _stretched(table: Sequence[float], steps: int) -> list[float]:
    """A table of ratios interpolated to other numbers of steps; its last entry counts as zero."""
    found = []
    for i in range(steps):
        place = i * (len(table) - 1) / steps
        at = min(int(place), len(table) - 2)
        found.append(
            math.exp((1 - place + at) * math.log(table[at]) + (place - at) * math.log(table[at + 1]))
        )
    return found
