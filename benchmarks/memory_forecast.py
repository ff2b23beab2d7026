"""The planner's memory forecast against what a training step really takes, on this machine.

``python benchmarks/memory_forecast.py`` trains two steps in each of some settings, one after another. Every
tensor that an operation makes is followed until its memory is freed (``LivePeak``); scratch memory inside an
operation is not seen. On a GPU (``--device cuda``) the allocator is asked. ``--only 0,2`` chooses lines.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shoestring.config import (
    CODEC_DOWNSAMPLING,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    TokensConfig,
    TransformerConfig,
)
from shoestring.diffusion.process import EDMProcess
from shoestring.interfaces import Conditioning
from shoestring.models.files import build_network
from shoestring.planning import forecast_memory
from shoestring.recipes import microdit
from shoestring.runtime import PRECISIONS, Workers, keep_freed_memory, stream
from shoestring.training.schedule import Position
from shoestring.training.step import Learner, TrainingBatch, train_step

CAPTION_TOKENS = 77
MODELS: dict[str, Callable[[], TransformerConfig]] = {"tiny2": microdit.tiny2}


class LivePeak(TorchDispatchMode):
    """Bytes of all tensors made inside the block, and the most there was at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._size: dict[int, int] = {}

    def follow(self, tree: Any, made: bool) -> None:
        """Follow tensors until their memory is freed; what was there before (not ``made``) counts nothing."""
        for leaf in tree_leaves(tree):
            if not isinstance(leaf, torch.Tensor):
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in self._size:
                self._size[key] = storage.nbytes() if made else 0
                self.live += self._size[key]
                weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int) -> None:
        self.live -= self._size.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        """Compute, and follow the results."""
        keywords = keywords or {}
        self.follow((arguments, keywords), made=False)
        result = function(*arguments, **keywords)
        self.follow(result, made=True)
        return result


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    model: str
    batch: int
    micro_batch: int
    mask: float
    precision: str = "bf16"
    checkpointing: bool = False
    method: str = "deferred"
    optimizer: str = "adamw"


SETTINGS = (
    Setting("tiny2", 8, 8, 0.75),
    Setting("tiny2", 8, 8, 0.0),
    Setting("tiny2", 8, 8, 0.0, checkpointing=True),
    Setting("tiny2", 8, 8, 0.75, precision="fp32"),
    Setting("tiny2", 32, 8, 0.75, optimizer="muon"),
    Setting("tiny2", 32, 32, 0.75),
)


def run_config(setting: Setting, model: TransformerConfig, resolution: int) -> RunConfig:
    """A run of one stage at a setting."""
    stage = StageConfig(
        name="step",
        nimg=setting.batch,
        batch=setting.batch,
        micro_batch=setting.micro_batch,
        resolution=resolution,
        mask_ratio=setting.mask,
        lr=1e-5,
    )
    return RunConfig(
        name="memory",
        precision=setting.precision,
        model=model.model_copy(update={"checkpoint_activations": setting.checkpointing}),
        tokens=TokensConfig(method=setting.method, first=1, last=-1),
        data=DataConfig(max_tokens=CAPTION_TOKENS, codec="autoencoder-kl", codec_path="none"),
        stages=(stage,),
        optimizer=OptimizerConfig(kind=setting.optimizer),
    )


def learner_of(config: RunConfig, device: torch.device) -> Learner:
    """Everything that a run of one rank trains with."""
    network = build_network(config, stream(config.seed, "init")).to(device)
    return Learner.build(
        network,
        config.tokens,
        EDMProcess(0.9),
        config.optimizer,
        Workers(1),
        precision=PRECISIONS[config.precision],
        power_ema=config.power_ema,
    )


def batch_of(config: RunConfig, device: torch.device) -> TrainingBatch:
    """Random latents, captions or classes, and draws."""
    stage, model = config.stages[0], config.model
    count, side = stage.batch, stage.resolution // CODEC_DOWNSAMPLING[config.data.codec]
    shape = (count, model.in_channels, side, side)
    condition = Conditioning.nothing(count, device)
    if model.condition == "text":
        condition = Conditioning(torch.randn(count, config.data.max_tokens, model.caption_dim, device=device))
    return TrainingBatch(
        x0=torch.randn(shape, device=device),
        conditioning=condition,
        noise=torch.randn(shape, device=device),
        level_B=torch.randn(count, device=device),
        mask_BL=torch.rand(count, (side // model.patch_size) ** 2, device=device),
    )


def measured_bytes(config: RunConfig, device: torch.device) -> int:
    """The most that the second step of a run needs at one time, weights and everything else included."""
    stage = config.stages[0]
    learner, batch = learner_of(config, device), batch_of(config, device)
    here = Position(0, stage, 0, 0, 0)

    def step() -> None:
        train_step(learner, batch, stage.micro_batch or stage.batch, stage.lr, stage.mask_ratio, here)

    step()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    with LivePeak() as made:
        step()
    text = batch.conditioning.text_BSD
    there = [
        *learner.model.parameters(),
        *learner.optimizers.tensors().values(),
        *learner.averages.tensors().values(),
        *(t for t in (batch.x0, batch.noise, batch.mask_BL, text) if t is not None),
    ]
    return made.peak + sum(tensor.nbytes for tensor in there)


def compare(config: RunConfig, device: torch.device) -> tuple[int, int]:
    """Forecast and measured bytes of a run's only stage."""
    stage = config.stages[0]
    micro_batch = stage.micro_batch or stage.batch
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    forecast = forecast_memory(config, stage, micro_batch=micro_batch, device_type=kind)
    return forecast.total, measured_bytes(config, device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for every setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="numbers of lines, with commas")
    words = parser.parse_args(arguments)
    device = torch.device(words.device)
    chosen = [SETTINGS[int(number)] for number in words.only.split(",") if number] or SETTINGS
    keep_freed_memory()
    print(f"{'setting':118} {'forecast':>9} {'measured':>9}  ratio")
    for setting in chosen:
        config = run_config(setting, MODELS[setting.model](), resolution=256)
        forecast, measured = compare(config, device)
        label = " ".join(f"{name}={value}" for name, value in vars(setting).items())
        print(
            f"{label:118} {forecast / 1e9:6.2f} GB {measured / 1e9:6.2f} GB {forecast / measured:6.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
