"""Run folders as training leaves them, written with its own functions but without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoestring.config import RunConfig, parse_yaml, to_yaml
from shoestring.models.files import ModelFacts, build_network, save_model
from shoestring.runtime import stream
from shoestring.training.display import RunLog

TINY = """
name: tiny
precision: fp32
model:
  in_channels: 3
  caption_dim: 256
  patch_size: 4
  dim: 32
  depth: 2
  head_dim: 16
  ffn_multiple_of: 16
  mixer: {depth: 1, dim: 32}
  experts: {count: 0}
  mask_captions: true
data: {source: shapes, text_encoder: hashing, max_tokens: 8}
stages:
  - {name: masked, nimg: 600, batch: 10, resolution: 8, mask_ratio: 0.5, lr: 0.002}
  - {name: dense, nimg: 400, batch: 10, resolution: 8, lr: 0.001}
sampling: {steps: 2, guidance: 2.0, sampler: euler}
logging: {log_nimg: 50, usd_per_hour: 36.0, tensorboard: false}
"""
LEVELS = {"0.1": 0.5, "2": 1.0, "20": 1.5}


def config_of(text: str = TINY, **changes: Any) -> RunConfig:
    """The tiny recipe with some sections replaced."""
    return parse_yaml(text).model_copy(update=changes)


def train_row(config: RunConfig, nimg: int, loss: float, **more: Any) -> dict[str, Any]:
    """A training row without the newer fields: ten images a second, a GFLOP each."""
    stage = config.stages[0 if nimg <= 600 else 1]
    elapsed_s = nimg / 10
    row = {
        "nimg": nimg, "step": nimg // 10, "stage": stage.name, "loss": loss, "lr": stage.lr,
        "mask_ratio": stage.mask_ratio, "grad_norm": 1.0, "images_per_s": 10.0, "peak_share": 0.1,
        "elapsed_s": elapsed_s, "cost_usd": elapsed_s / 3600 * config.logging.usd_per_hour,
    }  # fmt: skip
    return row | more


def validation_row(nimg: int, loss: float) -> dict[str, Any]:
    levels = {level: loss * share for level, share in LEVELS.items()}
    return {"nimg": nimg, "stage": "masked", "held_out": True, "loss": loss, "loss_per_level": levels}


def make_run(
    folder: Path, config: RunConfig | None = None, until: int = 1000, level: float = 1.0
) -> RunConfig:
    """Settings and log of a run whose loss falls as level / images; old rows, without optional fields."""
    config = config or config_of()
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "machine.json").write_text('{"shoestring": "0.1.0", "matmul_flops_fp32_cpu": 1e11}')
    log = RunLog(folder, 0, config.logging)
    for nimg in range(50, until + 1, 50):
        log.write("train", train_row(config, nimg, level * (1 + 100 / nimg)))
        if nimg % 200 == 0:
            log.write("validation", validation_row(nimg, level * (1 + 100 / nimg)))
    log.close()
    return config


def make_checkpoint(folder: Path, config: RunConfig, nimg: int = 1000, classes: Sequence[str] = ()) -> None:
    """A checkpoint with random weights, which no two runs share."""
    network = build_network(config, stream(len(folder.name), "test"))
    for parameter in network.parameters():  # gates begin at zero, and all pictures would be equal
        parameter.data += 0.02
    place = folder / "checkpoints" / f"{nimg:09d}"
    place.mkdir(parents=True)
    facts = ModelFacts(nimg, "ema", 0.5, 1.0, config.stages[-1].resolution, tuple(classes))
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    save_model(place / "ema.safetensors", {k: t.detach() for k, t in tensors.items()}, config, facts)
