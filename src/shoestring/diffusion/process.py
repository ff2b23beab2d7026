"""Noise processes: how noise is added, and how a network becomes a denoiser.

One language for all: xt = alpha x0 + sigma noise, and a denoiser returns x0. Two processes speak it:

* EDM (Karras et al. 2022, arXiv 2206.00364): alpha = 1, preconditioned network, ln sigma normal.
* Flow matching on the linear path (arXiv 2209.03003, 2210.02747): alpha = 1 - t, sigma = t, the network
  predicts the velocity noise - x0, t logit-normal (arXiv 2403.03206).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from shoestring.config import NoiseConfig, ProcessConfig, SamplingConfig
from shoestring.interfaces import Conditioning, Denoised, Network, NoiseLevel
from shoestring.tensors import Bool, Float, Int, gather_tokens, patchify

# ln(sigma / alpha) stays finite where alpha is zero (zero terminal SNR).
SMALLEST_ALPHA = 1e-6


def visible_tokens(
    image: Float[Tensor, "B C H W"], patch_size: int, visible_BK: Int[Tensor, "B K"] | None
) -> Float[Tensor, "B K G"]:
    """An image as the tokens of its visible patches."""
    tokens = patchify(image, patch_size)
    return tokens if visible_BK is None else gather_tokens(tokens, visible_BK)


class Process(ABC):
    """What training and sampling need of a noise process."""

    @abstractmethod
    def level_from_normal(self, normal_B: Float[Tensor, " B"], noise: NoiseConfig) -> NoiseLevel:
        """Training noise levels from standard normal numbers."""

    @abstractmethod
    def grid(self, sampling: SamplingConfig, steps: int) -> list[tuple[float, float]]:
        """The (alpha, sigma) pairs of a sampling run, noisiest first, ending at (1, 0): steps + 1 pairs."""

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

    def __init__(self, sigma_data: float) -> None:
        self.sigma_data = sigma_data

    def level_from_normal(self, normal_B: Float[Tensor, " B"], noise: NoiseConfig) -> NoiseLevel:
        """ln sigma = P_mean + P_std normal."""
        sigma_B = (noise.mean + noise.std * normal_B).exp()
        return NoiseLevel(torch.ones_like(sigma_B), sigma_B)

    def level_at(self, noise_to_signal_B: Float[Tensor, " B"]) -> NoiseLevel:
        """Alpha is 1, sigma the ratio."""
        return NoiseLevel(torch.ones_like(noise_to_signal_B), noise_to_signal_B)

    def grid(self, sampling: SamplingConfig, steps: int) -> list[tuple[float, float]]:
        """The rho grid (equation 5), then zero. One step starts at sigma_max."""
        high, low = (s ** (1 / sampling.rho) for s in (sampling.sigma_max, sampling.sigma_min))
        share = [i / (steps - 1) if steps > 1 else 0.0 for i in range(steps)]
        sigmas = [(high + s * (low - high)) ** sampling.rho for s in share]
        return [(1.0, sigma) for sigma in [*sigmas, 0.0]]

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

    def grid(self, sampling: SamplingConfig, steps: int) -> list[tuple[float, float]]:
        """Even steps of t from 1 to 0, shifted. The EDM settings of ``sampling`` do not apply."""
        t = self._shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()
        return [(1 - value, value) for value in t]

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
    sigma_data = config.sigma_data if config.sigma_data is not None else measured_sigma_data
    if sigma_data is None:
        raise ValueError("process.sigma_data is null and was not measured")
    return EDMProcess(sigma_data)
