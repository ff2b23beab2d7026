"""Noise processes: how noise is added, and how a network becomes a denoiser.

One language for all: xt = alpha x0 + sigma noise, and a denoiser returns x0. Three processes speak it:

* EDM (Karras et al. 2022, arXiv 2206.00364): alpha = 1, preconditioned network, ln sigma normal.
* Flow matching on the linear path (arXiv 2209.03003, 2210.02747): alpha = 1 - t, sigma = t, the network
  predicts the velocity noise - x0, t logit-normal (arXiv 2403.03206).
* DDPM (arXiv 2006.11239): a table of levels with alpha^2 + sigma^2 = 1, the network predicts noise, v or x0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shoestring.config import NoiseConfig, ProcessConfig, SamplingConfig
from shoestring.diffusion import grids
from shoestring.interfaces import Conditioning, Denoised, Network, NoiseLevel
from shoestring.runtime import UserError
from shoestring.tensors import Bool, Float, Int, gather_tokens, patchify

# ln(sigma / alpha) stays finite where alpha is zero (zero terminal SNR).
SMALLEST_ALPHA = 1e-6
NOTIONAL_TIMESTEPS = 1000
"""Entries that a table of flow matching's continuous time has where a grid is made in one."""


def visible_tokens(
    image: Float[Tensor, "B C H W"], patch_size: int, visible_BK: Int[Tensor, "B K"] | None
) -> Float[Tensor, "B K G"]:
    """An image as the tokens of its visible patches."""
    tokens = patchify(image, patch_size)
    return tokens if visible_BK is None else gather_tokens(tokens, visible_BK)


NEARLY = 1.01
"""Tables are printed rounded."""
NEAR = 1e-2
"""Of a timestep: so near to an entry, the rounding of float32 is all that lies between."""


class Process(ABC):
    """What training and sampling need of a noise process."""

    @abstractmethod
    def level_from_normal(self, normal_B: Float[Tensor, " B"], noise: NoiseConfig) -> NoiseLevel:
        """Training noise levels from standard normal numbers."""

    spacing: str
    """The usual grid of noise levels for sampling."""

    def grid(self, sampling: SamplingConfig, steps: int) -> list[tuple[float, float]]:
        """The levels of a sampling run; see :mod:`shoestring.diffusion.grids`.

        Args:
            sampling: which grid.
            steps: of the sampler.

        Returns:
            steps + 1 pairs (alpha, sigma), the noisiest first, the last one (1, 0).

        Raises:
            UserError: if the grid is not one of this process.
        """
        spacing = self.spacing if sampling.spacing == "auto" else sampling.spacing
        if spacing in grids.PLACES:
            return [*self.levels_at_places(grids.PLACES[spacing], steps), (1.0, 0.0)]
        least, most = self.ratios()
        low, high = max(least, sampling.sigma_min), min(most, sampling.sigma_max)
        if spacing != "table" and low >= high:
            raise UserError(
                f"sampling.sigma_min is {sampling.sigma_min:g} and sigma_max {sampling.sigma_max:g}, but "
                f"this process knows ratios from {least:.3g} to {most:.3g}, so the grid would rise; choose "
                "them so that they overlap with these"
            )
        table = sampling.sigmas or grids.ALIGN_YOUR_STEPS
        if spacing == "table" and (table[0] > most * NEARLY or table[-2] * NEARLY < least):
            raise UserError(
                f"sampling.sigmas goes from {table[0]:g} to {table[-2]:g} before its last value, but this "
                f"process knows ratios from {least:.3g} to {most:.3g}; leave out what is beyond them"
            )
        if spacing == "rho":
            ratios = grids.rho_grid(high, low, steps, sampling.rho)
        elif spacing == "log-snr":
            ratios = grids.log_snr_grid(high, low, steps)
        else:
            ratios = grids.table_grid(table, steps)
        level = self.level_at(torch.tensor(ratios, dtype=torch.float64))
        return [*zip(level.alpha_B.tolist(), level.sigma_B.tolist(), strict=True), (1.0, 0.0)]

    def ratios(self) -> tuple[float, float]:
        """The least and the greatest noise-to-signal ratio that the network was trained for."""
        return 0.0, math.inf

    def levels_at_places(
        self, places: Callable[[int, int], list[float]], steps: int
    ) -> list[tuple[float, float]]:
        """The levels at some places of the table of timesteps, for processes that have one.

        Args:
            places: gives them, from the numbers of timesteps and of steps.
            steps: how many.

        Returns:
            Pairs (alpha, sigma).

        Raises:
            UserError: if the process has none.
        """
        raise UserError(
            "sampling.spacing is trailing, leading or uniform, but process.kind=edm has no timesteps; choose "
            "auto, rho, log-snr or table"
        )

    @abstractmethod
    def weight(self, level: NoiseLevel) -> Float[Tensor, " B"]:
        """Loss weight of the squared error of x0 at each level."""

    @abstractmethod
    def coefficients(self, level: NoiseLevel) -> Coefficients:
        """How a network's output becomes x0: x0 = skip xt + out F(in xt, time)."""

    def validation_sigmas(self) -> tuple[float, ...]:
        """Noise-to-signal ratios sigma / alpha at which the validation loss is measured."""
        return (0.1, 0.3, 0.8, 2.0, 5.0, 20.0)

    @abstractmethod
    def level_at(self, noise_to_signal_B: Float[Tensor, " B"]) -> NoiseLevel:
        """The level with the given sigma / alpha."""

    def add_noise(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """xt = alpha x0 + sigma noise."""
        alpha, sigma = level.images()
        return alpha * x0 + sigma * noise

    def denoiser(self, network: Network, precision: torch.dtype = torch.float32) -> NetworkDenoiser:
        """The network as a denoiser; it runs under autocast to ``precision`` unless that is float32."""
        return NetworkDenoiser(self, network, precision)


@dataclass(frozen=True)
class Coefficients:
    """x0 = skip xt + out F(in xt, time), one each a sample."""

    skip_B: Tensor
    out_B: Tensor
    in_B: Tensor
    time_B: Tensor


class EDMProcess(Process):
    """EDM preconditioning, for any pair (alpha, sigma).

    With alpha = 1 these are the paper's equations; otherwise they hold for xt / alpha at sigma / alpha.

    Args:
        sigma_data: standard deviation of the latents.

    Source: arXiv 2206.00364, table 1 and equation 5.
    """

    spacing = "rho"

    def __init__(self, sigma_data: float) -> None:
        self.sigma_data = sigma_data

    def level_from_normal(self, normal_B: Float[Tensor, " B"], noise: NoiseConfig) -> NoiseLevel:
        """ln sigma = P_mean + P_std normal."""
        sigma_B = (noise.mean + noise.std * normal_B).exp()
        return NoiseLevel(torch.ones_like(sigma_B), sigma_B)

    def level_at(self, noise_to_signal_B: Float[Tensor, " B"]) -> NoiseLevel:
        """Alpha is 1, sigma the ratio."""
        return NoiseLevel(torch.ones_like(noise_to_signal_B), noise_to_signal_B)

    def weight(self, level: NoiseLevel) -> Float[Tensor, " B"]:
        """1 / c_out^2: (s^2 + sigma_data^2) / (s sigma_data)^2 with s = sigma / alpha."""
        return self.coefficients(level).out_B ** -2

    def coefficients(self, level: NoiseLevel) -> Coefficients:
        """c_skip, c_out, c_in and c_noise = ln(sigma) / 4."""
        alpha, sigma, data = level.alpha_B, level.sigma_B, self.sigma_data
        variance_B = (alpha * data).square() + sigma.square()
        ratio_B = sigma / alpha.clamp(min=SMALLEST_ALPHA)
        return Coefficients(
            skip_B=alpha * data**2 / variance_B,
            out_B=sigma * data * variance_B.rsqrt(),
            in_B=variance_B.rsqrt(),
            time_B=ratio_B.log() / 4,
        )


class FlowProcess(Process):
    """Flow matching on the linear path; t = 0 is clean, t = 1 is noise.

    Args:
        shift: t -> shift t / (1 + (shift - 1) t), for training and sampling (arXiv 2403.03206).
    """

    spacing = "trailing"
    time_scale = 1000.0
    """The network's time features see 1000 t, the range for which they were made."""

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def _shifted(self, t_B: Tensor) -> Tensor:
        return self.shift * t_B / (1 + (self.shift - 1) * t_B)

    def level_from_normal(self, normal_B: Float[Tensor, " B"], noise: NoiseConfig) -> NoiseLevel:
        """Logit t = mean + std normal, then shifted."""
        t_B = self._shifted((noise.mean + noise.std * normal_B).sigmoid())
        return NoiseLevel(1 - t_B, t_B)

    def level_at(self, noise_to_signal_B: Float[Tensor, " B"]) -> NoiseLevel:
        """T / (1 - t) is the ratio."""
        t_B = noise_to_signal_B / (1 + noise_to_signal_B)
        return NoiseLevel(1 - t_B, t_B)

    def levels_at_places(
        self, places: Callable[[int, int], list[float]], steps: int
    ) -> list[tuple[float, float]]:
        """Place p of the table is t = (p + 1) / 1000, shifted; without rounding."""
        t = torch.tensor(places(NOTIONAL_TIMESTEPS, steps), dtype=torch.float64)
        shifted = self._shifted((t + 1) / NOTIONAL_TIMESTEPS).tolist()
        return [(1 - value, value) for value in shifted]

    def weight(self, level: NoiseLevel) -> Float[Tensor, " B"]:
        """Turns the error of x0 into that of the velocity: ((alpha + sigma) / sigma)^2."""
        return self.coefficients(level).out_B ** -2

    def coefficients(self, level: NoiseLevel) -> Coefficients:
        """x0 = (xt - sigma v) / (alpha + sigma), as xt = alpha x0 + sigma (x0 + v)."""
        total_B = level.alpha_B + level.sigma_B
        return Coefficients(
            skip_B=1 / total_B,
            out_B=-level.sigma_B / total_B,
            in_B=1 / total_B,
            time_B=self.time_scale * level.sigma_B / total_B,
        )


def noise_table(schedule: str, timesteps: int, zero_terminal_snr: bool) -> Float[Tensor, " T"]:
    """Alpha of every timestep of DDPM, that is the root of the product of 1 - beta, in float64.

    Args:
        schedule: ``linear``: betas from 1e-4 to 0.02 (arXiv 2006.11239); ``scaled-linear``: their roots from
            those of 0.00085 to 0.012 (Stable Diffusion); ``cosine`` (arXiv 2102.09672, equation 17).
        timesteps: entries.
        zero_terminal_snr: shift and scale so that the last alpha is 0 and the first stays (arXiv 2305.08891,
            algorithm 1).

    Returns:
        Falling values.
    """
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
    elif schedule == "scaled-linear":
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, timesteps, dtype=torch.float64).square()
    else:
        share = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        product = ((share + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - product[1:] / product[:-1]).clamp(max=0.999)
    alpha_T = (1 - betas).cumprod(0).sqrt()
    if zero_terminal_snr:
        alpha_T = (alpha_T - alpha_T[-1]) * alpha_T[0] / (alpha_T[0] - alpha_T[-1])
    return alpha_T


class DDPMProcess(Process):
    """A table of levels with alpha^2 + sigma^2 = 1; the network sees the place in the table.

    Levels that are not in the table, also such with alpha = 1, are brought to alpha^2 + sigma^2 = 1 and have
    a place between two entries, interpolated in ln(sigma / alpha).

    Args:
        alpha_T: falling alphas, see :func:`noise_table`.
        prediction: ``epsilon`` (the noise), ``v`` (alpha noise - sigma x0, arXiv 2202.00512) or ``x0``.

    Source: arXiv 2006.11239.
    """

    spacing = "trailing"

    def __init__(self, alpha_T: Float[Tensor, " T"], prediction: str) -> None:
        self.alpha_T, self.prediction = alpha_T.double(), prediction
        self.sigma_T = (1 - self.alpha_T.square()).sqrt()
        self.log_ratio_T = (self.sigma_T / self.alpha_T.clamp(min=SMALLEST_ALPHA)).log()

    def _at(self, place_B: Tensor, like: Tensor) -> NoiseLevel:
        return NoiseLevel(self.alpha_T[place_B].to(like), self.sigma_T[place_B].to(like))

    def level_from_normal(self, normal_B: Float[Tensor, " B"], noise: NoiseConfig) -> NoiseLevel:
        """All entries of the table equally often: the normal distribution function makes them uniform."""
        last = len(self.alpha_T) - 1
        place_B = (torch.special.ndtr(normal_B.cpu().double()) * (last + 1)).long().clamp(max=last)
        return self._at(place_B, normal_B)

    def level_at(self, noise_to_signal_B: Float[Tensor, " B"]) -> NoiseLevel:
        """With alpha^2 + sigma^2 = 1."""
        norm_B = (1 + noise_to_signal_B.square()).rsqrt()
        return NoiseLevel(norm_B, noise_to_signal_B * norm_B)

    def ratios(self) -> tuple[float, float]:
        """Of the first and the last entry."""
        first, last = self.log_ratio_T[0].exp().item(), self.log_ratio_T[-1].exp().item()
        return first, last if self.alpha_T[-1] > 0 else math.inf

    def levels_at_places(
        self, places: Callable[[int, int], list[float]], steps: int
    ) -> list[tuple[float, float]]:
        """Of the nearest entries."""
        timesteps = len(self.alpha_T)
        grids.check_steps(steps, timesteps, places)
        found = [min(timesteps - 1, round(place)) for place in places(timesteps, steps)]
        return [(self.alpha_T[place].item(), self.sigma_T[place].item()) for place in found]

    def validation_sigmas(self) -> tuple[float, ...]:
        """The usual ratios, as far as the table has them."""
        low, high = self.ratios()
        return tuple(ratio for ratio in super().validation_sigmas() if low <= ratio <= high)

    def weight(self, level: NoiseLevel) -> Float[Tensor, " B"]:
        """Turns the error of x0 into that of what the network predicts, which counts alike everywhere."""
        return self.coefficients(level).out_B ** -2

    def coefficients(self, level: NoiseLevel) -> Coefficients:
        """x0 = (xt - sigma noise) / alpha = alpha xt - sigma v, for alpha^2 + sigma^2 = 1."""
        norm_B = (level.alpha_B.square() + level.sigma_B.square()).sqrt()
        alpha_B, sigma_B = level.alpha_B / norm_B, level.sigma_B / norm_B
        if self.prediction == "epsilon":
            inverse_B = 1 / alpha_B.clamp(min=SMALLEST_ALPHA)
            skip_B, out_B = inverse_B / norm_B, -sigma_B * inverse_B
        elif self.prediction == "v":
            skip_B, out_B = alpha_B / norm_B, -sigma_B
        else:
            skip_B, out_B = torch.zeros_like(alpha_B), torch.ones_like(alpha_B)
        return Coefficients(skip_B, out_B, 1 / norm_B, self._place(alpha_B, sigma_B))

    def _place(self, alpha_B: Tensor, sigma_B: Tensor) -> Tensor:
        """Where in the table a level is; exactly a whole number for the levels in it."""
        ratio_B = sigma_B.cpu().double() / alpha_B.cpu().double().clamp(min=SMALLEST_ALPHA)
        wanted_B = ratio_B.clamp(min=1e-30).log()
        after_B = torch.searchsorted(self.log_ratio_T, wanted_B).clamp(1, len(self.alpha_T) - 1)
        left_B, right_B = self.log_ratio_T[after_B - 1], self.log_ratio_T[after_B]
        place_B = after_B - 1 + ((wanted_B - left_B) / (right_B - left_B)).clamp(0, 1)
        whole_B = place_B.round()
        place_B = torch.where((place_B - whole_B).abs() < NEAR, whole_B, place_B)
        return place_B.to(alpha_B)


class NetworkDenoiser:
    """A network and its preconditioning: the seam ``Denoiser``.

    Low precision (autocast) is only around the network; everything at this boundary is float32, or float64
    where the input is.
    """

    def __init__(self, process: Process, network: Network, precision: torch.dtype) -> None:
        self.process, self.network, self.precision = process, network, precision

    @property
    def predicts_all(self) -> bool:
        """See :class:`shoestring.interfaces.Network`."""
        return self.network.predicts_all

    @property
    def patch_size(self) -> int:
        """Side of a patch."""
        return self.network.patch_size

    @property
    def guidance_input(self) -> bool:
        """See :class:`shoestring.interfaces.Network`."""
        return self.network.guidance_input

    def _autocast(self, device: torch.device) -> torch.autocast:
        low = self.precision != torch.float32
        # Every weight is used once in a pass: a cache of casts would only hold memory.
        return torch.autocast(device.type, self.precision, enabled=low, cache_enabled=False)

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """See :meth:`shoestring.interfaces.Network.prepare`."""
        with self._autocast(conditioning.device):
            return self.network.prepare(conditioning)

    def __call__(
        self,
        xt: Float[Tensor, "B C H W"],
        level: NoiseLevel,
        conditioning: Conditioning,
        visible_BK: Int[Tensor, "B K"] | None = None,
        path_dropped_B: Bool[Tensor, " B"] | None = None,
    ) -> Denoised:
        """Estimate x0 for the patches that the network predicts."""
        c = self.process.coefficients(level)
        patch_size = self.network.patch_size
        with self._autocast(xt.device):
            scaled = c.in_B[:, None, None, None] * xt
            output = self.network(scaled, c.time_B, conditioning, visible_BK, path_dropped_B)

        def estimate(tokens: Tensor, places: Tensor | None) -> Tensor:
            xt_BKG = visible_tokens(xt, patch_size, places)
            return c.skip_B[:, None, None] * xt_BKG + c.out_B[:, None, None] * tokens.to(xt.dtype)

        grid = (xt.shape[2] // patch_size, xt.shape[3] // patch_size)
        x0 = estimate(output.visible_BKG, output.visible_BK)
        if output.dropped_BJG is None:
            return Denoised(x0, output.visible_BK, grid, patch_size)
        dropped = estimate(output.dropped_BJG, output.dropped_BJ)
        return Denoised(x0, output.visible_BK, grid, patch_size, dropped, output.dropped_BJ)


def build_process(config: ProcessConfig, measured_sigma_data: float | None) -> Process:
    """The configured process.

    Args:
        config: kind and constants.
        measured_sigma_data: used where ``config.sigma_data`` is null.

    Returns:
        The process.

    Raises:
        ValueError: if EDM has neither a configured nor a measured sigma_data.
    """
    if config.kind == "flow":
        return FlowProcess(config.flow_shift)
    if config.kind == "ddpm":
        table = noise_table(config.schedule, config.timesteps, config.zero_terminal_snr)
        return DDPMProcess(table, config.prediction)
    sigma_data = config.sigma_data if config.sigma_data is not None else measured_sigma_data
    if sigma_data is None:
        raise ValueError("process.sigma_data is null and was not measured")
    return EDMProcess(sigma_data)
