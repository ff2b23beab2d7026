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

from shoestring.config.schema import NoiseConfig, SamplingConfig
from shoestring.diffusion.process import Coefficients, EDMProcess
from shoestring.interfaces import Conditioning, NoiseLevel
from shoestring.models.microdit import MicroDiT
from shoestring.models.released import config_from_released, load_released
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


def microdit(golden: Golden) -> Outputs:
    """What a MicroDiT golden file may hold, and how to compute it."""
    try:
        model = MicroDiT(config_from_released(golden.metadata))
        model.position_scale = float(json.loads(golden.metadata["dit"]).get("pos_interp_scale", 1.0))
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{golden.path}: the metadata describe no MicroDiT ({error!r})") from error
    load_released(model, golden.named("weight."), str(golden.path))
    model.to(golden.device)

    process = EDMProcess(golden.value("sigma_data"))
    denoiser = process.denoiser(model)
    bare = BareNetwork(1.0).denoiser(model)
    ratio, scale = golden.value("mask_ratio"), golden.value("cfg_scale")

    def text() -> Conditioning:
        return Conditioning(golden.input("captions"))

    def level(sigma_B: Tensor) -> NoiseLevel:
        return NoiseLevel(torch.ones_like(sigma_B), sigma_B)

    def visible() -> Tensor | None:
        return visible_from_noise(golden.input("mask_noise"), ratio)

    def dense() -> Tensor:
        return bare(golden.input("x"), level(golden.input("c_noise")), text()).image()

    def masked() -> Tensor:
        return bare(golden.input("x"), level(golden.input("c_noise")), text(), visible()).image()

    def mask() -> Tensor:
        visible_BK = visible()
        noise_BL = golden.input("mask_noise")
        if visible_BK is None:
            return torch.zeros_like(noise_BL)
        return torch.ones_like(noise_BL).scatter(1, visible_BK, 0.0)

    def cfg() -> Tensor:
        return GuidedDenoiser(bare, SamplingConfig(guidance=scale))(
            golden.input("x"), level(golden.input("c_noise")), text()
        ).image()

    def denoised() -> Tensor:
        return denoiser(golden.input("x"), level(golden.input("sigma")), text()).image()

    def loss(mask_ratio: float) -> Tensor:
        noise = NoiseConfig(mean=golden.value("P_mean"), std=golden.value("P_std"))
        batch = TrainingBatch(
            x0=golden.input("x"),
            conditioning=text(),
            noise=golden.input("loss_noise"),
            level_B=golden.input("loss_rnd_normal"),
            mask_BL=golden.input("mask_noise"),
        )
        return batch_loss(process, denoiser, batch, noise, mask_ratio)[None]

    def gradient_norms() -> Tensor:
        model.zero_grad(set_to_none=False)
        with torch.enable_grad():
            loss(ratio).backward()
        by_name = sorted(model.named_parameters())
        return torch.stack([p.new_zeros(()) if p.grad is None else p.grad.norm() for _, p in by_name])

    def sample_heun() -> Tensor:
        sigma_max = golden.value("sigma_max", 80)
        sampling = SamplingConfig(
            sigma_min=golden.value("sigma_min", 0.002), sigma_max=sigma_max, rho=golden.value("rho", 7)
        )
        guided = GuidedDenoiser(denoiser, SamplingConfig(guidance=scale))
        grid = process.grid(sampling, int(golden.value("heun_steps")))
        return heun(guided, golden.input("latents") * sigma_max, grid, guided.prepare(text()))

    return {
        "dense": dense,
        "masked": masked,
        "mask": mask,
        "cfg": cfg,
        "denoised": denoised,
        "loss_dense": lambda: loss(0.0),
        "loss_masked": lambda: loss(ratio),
        "gradnorm_masked": gradient_norms,
        "sample_heun": sample_heun,
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

# kind in the metadata -> how to compute the outputs, how far each may be off
CHECKERS: Mapping[str, tuple[Callable[[Golden], Outputs], Mapping[str, Tolerance]]] = {
    "microdit": (microdit, MICRODIT_TOLERANCES),
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
