"""The denoiser as a program: ``torch.export``, and ONNX checked in onnxruntime.

A denoiser estimates the clean latents: (xt, alpha, sigma, condition) to x0, with xt = alpha x0 + sigma
noise. Batch, height and width are free.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.config import UNetConfig
from shoestring.diffusion.process import build_process
from shoestring.export.card import model_card
from shoestring.export.pipeline import plain_transformer, require_diffusers, scheduler_config
from shoestring.export.place import whole_folder
from shoestring.export.source import Source
from shoestring.interfaces import Conditioning, NoiseLevel
from shoestring.models.transformer import DiffusionTransformer
from shoestring.models.unet import UNet
from shoestring.runtime import UserError, stream, write_text

TOLERANCE = 1e-4
"""Largest error, relative to the largest value, at which a program is taken to do what the network does."""
OPSET = 20
CAPTION = 8
"""Tokens of the captions that a program is traced and checked with; it takes any number."""


class Program(nn.Module):
    """What is exported: network and preconditioning in one."""

    def __init__(self, source: Source) -> None:
        from shoestring.export.remote.shoestring_scheduler import ShoestringScheduler

        super().__init__()
        config, network = source.config, source.network
        self.scheduler: Any = ShoestringScheduler(**scheduler_config(config, source.facts.sigma_data))
        self.condition = config.model.condition
        self.fold = config.model.patch_size if isinstance(config.model, UNetConfig) else 1
        self.mask_captions = config.model.mask_captions
        self.class_table: nn.Module | None = None
        self.is_transformer = isinstance(network, DiffusionTransformer)
        if isinstance(network, DiffusionTransformer):
            self.network: Any = plain_transformer(network)
        else:
            from diffusers.models.attention_processor import AttnProcessor2_0

            from shoestring.export.remote.shoestring_class_table import ShoestringClassTable

            assert isinstance(network, UNet)
            self.network = network.unet
            self.network.set_attn_processor(AttnProcessor2_0())
            if network.y_embedder is not None:
                weight = network.y_embedder.embedding_table.weight
                self.class_table = ShoestringClassTable(classes=weight.shape[1], dim=weight.shape[0])
                self.class_table.load_state_dict({"rows": weight.t().contiguous()})

    def forward(
        self,
        xt: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Estimate x0.

        Args:
            xt: noisy latents ``B C H W``.
            alpha: of the noise level, one a sample; 1 for edm.
            sigma: likewise.
            text: caption tokens ``B S D``.
            text_mask: ``B S``, true at real tokens; read by models that mask captions.
            label: classes, -1 for none.
            guidance: its scale, of models that take it as an input.

        Returns:
            Clean latents.
        """
        from shoestring.export.remote.pipeline import folded, guidance_features, unfolded

        _, _, scale, time = self.scheduler.coefficients(alpha, sigma)
        scaled = scale[:, None, None, None] * xt
        if self.is_transformer:
            output = self.network(scaled, time, text, text_mask, label, guidance)[0]
        else:
            if self.class_table is not None:
                assert label is not None or self.condition == "none"
                rows = torch.zeros_like(sigma, dtype=torch.long) if label is None else label
                text = self.class_table(rows)
            seen = text_mask if self.mask_captions else None
            output = self.network(
                folded(scaled, self.fold),
                time,
                text,
                timestep_cond=None if guidance is None else guidance_features(guidance),
                encoder_attention_mask=seen,
                return_dict=False,
            )
            output = unfolded(output[0], self.fold)
        return self.scheduler.denoised(output, xt, alpha, sigma)


@dataclass(frozen=True)
class Inputs:
    """Inputs of a program by name, and what of their shapes is free."""

    values: dict[str, Tensor]
    free: dict[str, dict[int, Any]]

    @property
    def described(self) -> dict[str, Any]:
        """For the folder's mark."""
        return {
            name: {"type": str(value.dtype).removeprefix("torch."), "shape": self._shape(name, value)}
            for name, value in self.values.items()
        }

    def _shape(self, name: str, value: Tensor) -> list[Any]:
        letters = (
            {0: "batch", 1: "tokens"} if name.startswith("text") else {0: "batch", 2: "height", 3: "width"}
        )
        return [letters[i] if i in self.free[name] else side for i, side in enumerate(value.shape)]


def unit_of(source: Source) -> int:
    """Sides of latents must be multiples of this."""
    model = source.config.model
    if isinstance(model, UNetConfig):
        return model.patch_size * 2 ** (len(model.multipliers) - 1)
    return model.patch_size


def least_side(source: Source) -> int:
    """Rows and columns from which on every expert has a token to choose."""
    model = source.config.model
    if isinstance(model, UNetConfig) or not model.experts.count:
        return 2
    return max(2, math.ceil(math.sqrt(model.experts.count / model.experts.capacity)))


def inputs_of(source: Source, batch: int, rows: int, columns: int) -> Inputs:
    """Inputs of a size.

    Args:
        source: the model.
        batch: samples.
        rows: height in units of :func:`unit_of`.
        columns: width, likewise.

    Returns:
        Random values.
    """
    model, unit = source.config.model, unit_of(source)
    draw = stream(0, "program", rows * columns)
    # Code of diffusers' upsampling depends on whether there are 64 samples.
    b = torch.export.Dim("batch", max=63 if isinstance(model, UNetConfig) else None)
    h, w = (torch.export.Dim(name, min=least_side(source)) for name in ("rows", "columns"))
    side_h, side_w = (unit * h, unit * w) if unit > 1 else (h, w)
    xt = torch.randn(batch, model.in_channels, unit * rows, unit * columns, generator=draw)
    level = build_process(source.config.process, source.facts.sigma_data).level_at(
        torch.rand(batch, generator=draw) * 3 + 0.2
    )
    values = {"xt": xt, "alpha": level.alpha_B, "sigma": level.sigma_B}
    free: dict[str, dict[int, Any]] = {"xt": {0: b, 2: side_h, 3: side_w}, "alpha": {0: b}, "sigma": {0: b}}
    if model.condition == "text":
        tokens = torch.export.Dim("tokens")
        values["text"] = torch.randn(batch, CAPTION, model.caption_dim, generator=draw)
        free["text"] = {0: b, 1: tokens}
        if model.mask_captions:
            values["text_mask"] = torch.arange(CAPTION)[None] <= torch.arange(batch)[:, None] + 1
            free["text_mask"] = {0: b, 1: tokens}
    elif model.condition == "class":
        values["label"] = torch.arange(batch) % model.classes
        values["label"][0] = -1
        free["label"] = {0: b}
    if model.guidance_input:
        values["guidance"] = 1 + torch.arange(batch, dtype=torch.float32)
        free["guidance"] = {0: b}
    return Inputs(values, free)


def expected(source: Source, inputs: Inputs) -> Tensor:
    """What the network itself makes of inputs, as ``shoestring sample`` calls it."""
    values = inputs.values
    process = build_process(source.config.process, source.facts.sigma_data)
    conditioning = Conditioning.nothing(len(values["xt"]))
    if "text" in values:
        conditioning = Conditioning(values["text"], values.get("text_mask"))
    elif "label" in values:
        conditioning = Conditioning(class_B=values["label"])
    conditioning = replace(conditioning, guidance_B=values.get("guidance"))
    level = NoiseLevel(values["alpha"], values["sigma"])
    with torch.no_grad():
        return process.denoiser(source.network)(values["xt"], level, conditioning).image()


SIZES = ((1, 0, 0), (2, 2, 1), (3, 1, 3))
"""Batches, and rows and columns beyond the least, at which programs are checked."""


def check_program(source: Source, run: Any, what: str) -> float:
    """Compare a program with the network at three sizes.

    Args:
        source: the model.
        run: gives the output for :class:`Inputs`.
        what: its name, for the message.

    Returns:
        The largest error, relative to the largest value.

    Raises:
        UserError: if it is above :data:`TOLERANCE`.
    """
    worst = 0.0
    least = least_side(source)
    for batch, more_rows, more_columns in SIZES:
        rows, columns = least + more_rows, least + more_columns
        inputs = inputs_of(source, batch, rows, columns)
        reference, made = expected(source, inputs), run(inputs)
        error = ((made - reference).abs().max() / reference.abs().max()).item()
        if not error <= TOLERANCE:
            side = f"{unit_of(source) * rows} x {unit_of(source) * columns}"
            raise UserError(
                f"the {what} program differs from the network by {error:.1e} of the largest value at {side} "
                f"latents, which is above {TOLERANCE:g}; nothing was written, please report it"
            )
        worst = max(worst, error)
    return worst


def exported_program(source: Source) -> torch.export.ExportedProgram:
    """The denoiser by ``torch.export``, for any batch and any sides that fit.

    Args:
        source: the model; position tables that its file has brought along are left out, see below.

    Returns:
        The program.

    Raises:
        UserError: if torch cannot export it.
    """
    require_diffusers()
    if source.config.superres is not None:
        raise UserError(
            f"{source.config.name} enlarges pictures, and programs draw from words only; use --to file"
        )
    # A table of one grid cannot follow the size; the network makes its own for every grid.
    source.network.pos_embed = source.network.decoder_pos_embed = None
    program, inputs = (
        Program(source).eval(),
        inputs_of(source, 2, least_side(source) + 2, least_side(source) + 1),
    )
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(program, (), inputs.values, dynamic_shapes=inputs.free, strict=False)
    except Exception as error:  # of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"torch.export cannot export {source.config.name} ({reason})") from error


def export_torch(source: Source, target: Path) -> str:
    """Write a folder with ``model.pt2``.

    Args:
        source: what to export.
        target: folder; see :func:`shoestring.export.place.whole_folder`.

    Returns:
        A sentence on how far it is from the network.

    Raises:
        UserError: if the model cannot be exported, or is not the same afterwards.
    """
    program = exported_program(source)
    with whole_folder(target, _about(source, "torch")) as folder:
        torch.export.save(program, folder / "model.pt2")
        again = torch.export.load(folder / "model.pt2").module()
        with torch.no_grad():
            error = check_program(source, lambda inputs: again(**inputs.values), "exported")
        write_text(folder / "README.md", model_card(source, "torch"))
    return f"model.pt2 differs from the network by {error:.1e} at three sizes"


def export_onnx(source: Source, target: Path) -> str:
    """Write a folder with ``model.onnx``, and check it in onnxruntime.

    Args:
        source: what to export.
        target: folder; see :func:`shoestring.export.place.whole_folder`.

    Returns:
        A sentence on how far it is from the network.

    Raises:
        UserError: if packages are missing, the model cannot be exported, or is not the same afterwards.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise UserError(
            f"--to onnx needs the package {missing.name}; run: pip install 'shoestring[export]'"
        ) from missing
    program = exported_program(source)
    with _quiet():
        onnx_program = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    assert onnx_program is not None
    with whole_folder(target, _about(source, "onnx") | {"opset": OPSET}) as folder:
        onnx_program.save(folder / "model.onnx")
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

        def run(inputs: Inputs) -> Tensor:
            given = {name: value.numpy() for name, value in inputs.values.items()}
            return torch.from_numpy(session.run(None, given)[0])

        error = check_program(source, run, "ONNX")
        write_text(folder / "README.md", model_card(source, "onnx"))
    return f"model.onnx differs from the network by {error:.1e} in onnxruntime at three sizes"


def _about(source: Source, kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": source.config.name,
        "images_seen": source.facts.nimg,
        "inputs": inputs_of(source, 2, least_side(source), least_side(source)).described,
        "multiple_of": unit_of(source),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on packages and symbols."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.fx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
