"""Compare our networks with golden tensors: ``python tests/parity/check.py FILE...``.

A golden file is one safetensors: ``weight.*`` under released names, ``in.*`` inputs, ``out.*`` what the
released code returned; the metadata holds the constructor values, from which the model is built, so files of
any size can be checked. Every ``out.*`` is computed anew through the same functions that train and sample.

Exit status: 0 all within tolerance, 1 something is not (or nobody knows how to compute it), 2 unreadable.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoestring.config import DecoderConfig, NoiseConfig, SamplingConfig, TokensConfig
from shoestring.diffusion.losses import denoising_loss
from shoestring.diffusion.process import Coefficients, EDMProcess
from shoestring.interfaces import Conditioning, Denoiser, NoiseLevel
from shoestring.models.maskdit import MaskDiT
from shoestring.models.microdit import MicroDiT
from shoestring.models.released import load_released
from shoestring.models.released_config import config_from_released, maskdit_config
from shoestring.models.transformer import DiffusionTransformer
from shoestring.runtime import UserError, pick_device
from shoestring.sampling.guidance import GuidedDenoiser
from shoestring.sampling.solvers import heun
from shoestring.tensors import visible_from_noise
from shoestring.training.step import TrainingBatch, batch_loss

Outputs = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Tolerance:
    """How far an output may be off: absolute on a CPU, elsewhere, and whether as a norm of the whole."""

    cpu: float
    elsewhere: float
    relative_norm: bool = False

    def on(self, device: torch.device) -> float:
        """The limit on a device."""
        return self.cpu if device.type == "cpu" else self.elsewhere

    def error(self, got: Tensor, expected: Tensor) -> float:
        """Largest absolute error, or ||got - expected|| / ||expected||; NaN counts as infinite."""
        got, expected = got.double().cpu(), expected.double()
        difference = got - expected
        if self.relative_norm:
            error = (difference.norm() / expected.norm()).item()
        else:
            error = difference.abs().max().item()
        return error if error == error else float("inf")


class Golden:
    """A golden file in memory."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a golden safetensors file")
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from error
        if "kind" not in self.metadata:
            raise UserError(f"{path}: the metadata has no 'kind'; it is not a golden file")

    def value(self, key: str, default: float | None = None) -> float:
        """A number of the metadata."""
        text = self.metadata.get(key, None if default is None else str(default))
        try:
            return float(text)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.path}: metadata {key!r} is {text!r}; it must be a number") from error

    def input(self, name: str) -> Tensor:
        """The tensor ``in.NAME``."""
        if f"in.{name}" not in self.tensors:
            raise UserError(f"{self.path}: tensor in.{name} is missing, and an output needs it")
        return self.tensors[f"in.{name}"].to(self.device)

    def named(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose names begin with the prefix, without it."""
        return {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}


class BareNetwork(EDMProcess):
    """No preconditioning, and sigma is the time itself: a denoiser of it is the bare network."""

    def coefficients(self, level: NoiseLevel) -> Coefficients:
        """x0 = F(xt, sigma)."""
        one_B = torch.ones_like(level.sigma_B)
        return Coefficients(skip_B=0 * one_B, out_B=one_B, in_B=one_B, time_B=level.sigma_B)


class Case:
    """A golden file's network and inputs, and what both kinds of network compute alike.

    Args:
        golden: the file; its weights are loaded into the network.
        network: built from the metadata.
        conditioning: called when an output needs it.
        tokens: the token method and its losses.
    """

    def __init__(
        self,
        golden: Golden,
        network: DiffusionTransformer,
        conditioning: Callable[[], Conditioning],
        tokens: TokensConfig,
    ) -> None:
        self.golden, self.network, self.conditioning, self.tokens = golden, network, conditioning, tokens
        load_released(network, golden.named("weight."), str(golden.path))
        network.to(golden.device)
        self.process = EDMProcess(golden.value("sigma_data"))
        self.denoiser = self.process.denoiser(network)
        self.ratio, self.scale = golden.value("mask_ratio"), golden.value("cfg_scale")

    def level(self, sigma_B: Tensor) -> NoiseLevel:
        """EDM levels."""
        return NoiseLevel(torch.ones_like(sigma_B), sigma_B)

    def visible(self) -> Tensor | None:
        """Visible patches of the file's mask noise."""
        return visible_from_noise(self.golden.input("mask_noise"), self.ratio)

    def mask(self) -> Tensor:
        """1 where a patch is dropped."""
        visible_BK = self.visible()
        noise_BL = self.golden.input("mask_noise")
        if visible_BK is None:
            return torch.zeros_like(noise_BL)
        return torch.ones_like(noise_BL).scatter(1, visible_BK, 0.0)

    def estimate(self, denoiser: Denoiser, level_B: Tensor, visible_BK: Tensor | None = None) -> Tensor:
        """What a denoiser makes of ``in.x``, as images."""
        x, conditioning = self.golden.input("x"), self.conditioning()
        return denoiser(x, self.level(level_B), conditioning, visible_BK).image()

    def guided(self, denoiser: Denoiser) -> GuidedDenoiser:
        """Guidance as the file wants it."""
        return GuidedDenoiser(denoiser, SamplingConfig(guidance=self.scale))

    def noise(self) -> NoiseConfig:
        """Distribution of training noise levels."""
        return NoiseConfig(mean=self.golden.value("P_mean"), std=self.golden.value("P_std"))

    def loss(self, mask_ratio: float) -> Tensor:
        """The loss that a training step would see, shaped ``1``."""
        batch = TrainingBatch(
            x0=self.golden.input("x"),
            conditioning=self.conditioning(),
            noise=self.golden.input("loss_noise"),
            level_B=self.golden.input("loss_rnd_normal"),
            mask_BL=self.golden.input("mask_noise"),
        )
        return batch_loss(self.process, self.denoiser, batch, self.noise(), mask_ratio, self.tokens)[None]

    def sample_losses(self, tokens: TokensConfig) -> Tensor:
        """The masked loss of each sample."""
        return denoising_loss(
            self.process,
            self.denoiser,
            self.golden.input("x"),
            self.golden.input("loss_noise"),
            self.process.level_from_normal(self.golden.input("loss_rnd_normal"), self.noise()),
            self.conditioning(),
            self.visible(),
            tokens=tokens,
        )

    def gradient_norms(self) -> Tensor:
        """Of the masked loss, parameters in string order of their names."""
        self.network.zero_grad(set_to_none=False)
        with torch.enable_grad():
            self.loss(self.ratio).sum().backward()
        by_name = sorted(self.network.named_parameters())
        return torch.stack([p.new_zeros(()) if p.grad is None else p.grad.norm() for _, p in by_name])

    def sample_heun(self) -> Tensor:
        """A whole sampling run with guidance."""
        golden = self.golden
        sigma_max = golden.value("sigma_max", 80)
        sampling = SamplingConfig(
            sigma_min=golden.value("sigma_min", 0.002), sigma_max=sigma_max, rho=golden.value("rho", 7)
        )
        guided = self.guided(self.denoiser)
        grid = self.process.grid(sampling, int(golden.value("heun_steps")))
        return heun(guided, golden.input("latents") * sigma_max, grid, guided.prepare(self.conditioning()))


def microdit(golden: Golden) -> Outputs:
    """What a MicroDiT golden file may hold, and how to compute it."""
    try:
        network = MicroDiT(config_from_released(golden.metadata))
        network.position_scale = float(json.loads(golden.metadata["dit"]).get("pos_interp_scale", 1.0))
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{golden.path}: the metadata describe no MicroDiT ({error!r})") from error
    case = Case(golden, network, lambda: Conditioning(golden.input("captions")), TokensConfig())
    bare = BareNetwork(1.0).denoiser(network)

    def time() -> Tensor:
        return golden.input("c_noise")

    return {
        "dense": lambda: case.estimate(bare, time()),
        "masked": lambda: case.estimate(bare, time(), case.visible()),
        "mask": case.mask,
        "cfg": lambda: case.estimate(case.guided(bare), time()),
        "denoised": lambda: case.estimate(case.denoiser, golden.input("sigma")),
        "loss_dense": lambda: case.loss(0.0),
        "loss_masked": lambda: case.loss(case.ratio),
        "gradnorm_masked": case.gradient_norms,
        "sample_heun": case.sample_heun,
    }


def maskdit(golden: Golden) -> Outputs:
    """What a MaskDiT golden file may hold, and how to compute it."""
    keys = ("hidden_size", "depth", "num_heads", "patch_size", "in_channels", "num_classes")
    decoder_keys = ("decoder_depth", "decoder_width", "decoder_heads")
    sizes = [int(golden.value(key)) for key in keys]
    depth, width, heads = (int(golden.value(key, 0)) for key in decoder_keys)
    tokens = TokensConfig(method="dense")
    try:
        decoder = DecoderConfig(depth=depth, dim=width, head_dim=width // heads) if depth else None
        config = maskdit_config(*sizes, decoder)
        if decoder is not None:
            tokens = TokensConfig(method="maskdit", reconstruction=golden.value("mae_coef"))
        network = MaskDiT(config, tokens)
    except (ValidationError, ZeroDivisionError) as error:
        raise UserError(f"{golden.path}: the metadata describe no MaskDiT ({error!r})") from error
    case = Case(golden, network, lambda: Conditioning(class_B=golden.input("class_index")), tokens)

    def sigma() -> Tensor:
        return golden.input("sigma")

    return {
        "denoised": lambda: case.estimate(case.denoiser, sigma()),
        "denoised_cfg": lambda: case.estimate(case.guided(case.denoiser), sigma()[1].expand(len(sigma()))),
        "masked": lambda: case.estimate(case.denoiser, sigma(), case.visible()),
        "mask": case.mask,
        "loss_dsm": lambda: case.sample_losses(tokens.model_copy(update={"reconstruction": 0.0})),
        "loss_total": lambda: case.sample_losses(tokens),
        "gradnorm": case.gradient_norms,
        "sample_heun": case.sample_heun,
    }


MICRODIT_TOLERANCES = {
    "dense": Tolerance(2e-5, 1e-4),
    "masked": Tolerance(2e-5, 1e-4),
    "mask": Tolerance(0.0, 0.0),
    "cfg": Tolerance(5e-5, 1e-4),
    "denoised": Tolerance(2e-5, 1e-4),
    "loss_dense": Tolerance(1e-5, 1e-4),
    "loss_masked": Tolerance(1e-5, 1e-4),
    "gradnorm_masked": Tolerance(5e-5, 1e-4),
    "sample_heun": Tolerance(1e-4, 1e-3, relative_norm=True),
}

MASKDIT_TOLERANCES = {
    "denoised": Tolerance(2e-5, 1e-4),
    "denoised_cfg": Tolerance(5e-5, 1e-4),
    "masked": Tolerance(2e-5, 1e-4),
    "mask": Tolerance(0.0, 0.0),
    "loss_dsm": Tolerance(1e-5, 1e-4),
    "loss_total": Tolerance(1e-5, 1e-4),
    "gradnorm": Tolerance(5e-5, 1e-4),
    "sample_heun": Tolerance(1e-4, 1e-3, relative_norm=True),
}

# kind in the metadata -> how to compute the outputs, how far each may be off
CHECKERS: Mapping[str, tuple[Callable[[Golden], Outputs], Mapping[str, Tolerance]]] = {
    "microdit": (microdit, MICRODIT_TOLERANCES),
    "maskdit": (maskdit, MASKDIT_TOLERANCES),
}


def _row(name: str, error: str, limit: str, verdict: str) -> None:
    print(f"  {name:<24} {error:>14} {limit:>10}  {verdict}")


def _compare(golden: Golden, name: str, compute: Callable[[], Tensor], tolerance: Tolerance) -> bool:
    expected = golden.tensors[f"out.{name}"]
    try:
        with torch.no_grad():
            got = compute()
    except (RuntimeError, IndexError, ArithmeticError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{golden.path}: out.{name} cannot be computed from its inputs ({reason})") from error
    if got.shape != expected.shape:
        _row(f"out.{name}", "-", "-", f"FAILED: shape {list(got.shape)}, expected {list(expected.shape)}")
        return False
    largest, limit = tolerance.error(got, expected), tolerance.on(golden.device)
    _row(f"out.{name}", f"{largest:.2e}", f"{limit:.0e}", "ok" if largest <= limit else "FAILED")
    return largest <= limit


def check(path: Path, device: torch.device) -> bool:
    """Check one file and print a table.

    Args:
        path: golden file.
        device: where to compute.

    Returns:
        Whether every ``out.*`` is known and within tolerance.

    Raises:
        UserError: if the file cannot be read or lacks something.
    """
    golden = Golden(path, device)
    kind = golden.metadata["kind"]
    print(f"{path} ({kind})")
    if kind not in CHECKERS:
        print(f"  FAILED: there is no checker for files of kind {kind!r}; known: {', '.join(CHECKERS)}")
        return False
    prepare, tolerances = CHECKERS[kind]
    computed = prepare(golden)
    names = sorted(golden.named("out."))
    if not names:
        raise UserError(f"{path}: there is no out.* tensor to compare with")
    _row("tensor", "largest error", "tolerance", "")
    passed = True
    for name in names:
        if name not in computed:
            _row(f"out.{name}", "-", "-", "FAILED: unknown output")
            passed = False
        else:
            passed &= _compare(golden, name, computed[name], tolerances[name])
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Check all files named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare our networks with golden tensors.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, auto")
    options = parser.parse_args(arguments)
    status = 0
    for path in options.files:
        try:
            status = max(status, 0 if check(path, pick_device(options.device)) else 1)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
