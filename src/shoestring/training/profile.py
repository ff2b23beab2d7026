"""Where the time of a training step goes, by parts of the model: the command ``shoestring profile``.

Blocks run uncompiled, as compiled ones mix the parts, and all operations on the calling thread, one after
another. The time of an operation includes what it costs to start it; on a GPU each is waited for. So the
table says what costs how much, and below it stands the time of whole steps, taken without a look inside.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from shoestring.config import CODEC_DOWNSAMPLING, RunConfig, StageConfig
from shoestring.diffusion.process import build_process
from shoestring.encoders.image import build_codec
from shoestring.encoders.text import build_text_encoder
from shoestring.interfaces import Conditioning
from shoestring.models.files import build_network
from shoestring.models.lora import train_factors_only
from shoestring.models.network import BaseNetwork
from shoestring.models.routing import method_class
from shoestring.planning import measured_peak_flops, patch_grid
from shoestring.runtime import PRECISIONS, Workers, stream
from shoestring.training.averages import Averages
from shoestring.training.operations import EXPERTS, LOSS, Ledger, PartTime, watched
from shoestring.training.optim import Optimizers
from shoestring.training.stage_data import check_settings, load_stage
from shoestring.training.step import TrainingBatch, batch_loss

CLIP, OPTIMISER, AVERAGES, DATA = "clip", "optimiser", "averages", "data"
ORDER = (
    *("embedding", "captions", "mixer", "backbone", EXPERTS, "token method", "decoder"),
    *("down", "middle", "up", "head", LOSS),
)
SIGMA_DATA = 0.5
"""Of made-up data, where the recipe measures its own; no time depends on it."""


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a step goes."""

    parts: dict[str, PartTime]
    """By name, in the order of a step."""
    whole_s: float
    """A step that nobody looks into, data left out."""
    images: int
    peak_flops: float
    """Best rate of matrix products on this machine."""

    @property
    def flops(self) -> float:
        """Of a step."""
        return sum(part.flops for part in self.parts.values())


class _Steps:
    """The training steps of a stage, without anything beside them."""

    def __init__(
        self, config: RunConfig, stage: StageConfig, device: torch.device, sigma_data: float
    ) -> None:
        self.config, self.stage, self.device = config, stage, device
        self.network: BaseNetwork = build_network(config, stream(config.seed, "init")).to(device)
        train_factors_only(self.network)
        self.network.position_scale = stage.position_scale
        self.process = build_process(config.process, sigma_data)
        self.denoiser = self.process.denoiser(self.network, PRECISIONS[config.precision])
        self.optimizers = Optimizers(self.network, config.optimizer, Workers(1))
        self.averages = Averages(self.network, config.power_ema)
        self.optimizers.set_lr(stage.lr)

    def step(self, batch: TrainingBatch, ledger: Ledger, look: bool) -> None:
        """One step; ``look`` says whether into the parts of the network, too."""
        with watched(self.network, ledger) if look else nullcontext():
            loss = batch_loss(
                self.process,
                self.denoiser,
                batch,
                self.stage.noise,
                self.stage.mask_ratio,
                self.config.tokens,
            )
            loss.backward()
        limit = float("inf") if self.stage.clip_norm is None else self.stage.clip_norm
        size = len(batch.x0)
        after: tuple[tuple[str, Callable[[], object]], ...] = (
            (CLIP, lambda: nn.utils.clip_grad_norm_(self.network.parameters(), limit)),
            (OPTIMISER, self.optimizers.step),
            (AVERAGES, lambda: self.averages.update(self.stage.ema_decay or 0.0, size, size)),
        )
        for name, do in after:
            start_s = ledger.clock()
            do()
            ledger.part(name).forward_s += ledger.clock() - start_s


def random_batch(config: RunConfig, size: int, side: int, device: torch.device) -> TrainingBatch:
    """Made-up latents and captions: the time of a step does not depend on them.

    Args:
        config: of the run.
        size: images.
        side: of the latents.
        device: where they go.

    Returns:
        A batch; captions are as long as they can be.
    """
    generator, model = stream(config.seed, "profile"), config.model

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    conditioning = Conditioning.nothing(size, device)
    if model.condition == "text":
        length = config.data.max_tokens
        hidden = torch.ones(size, length, dtype=torch.bool, device=device) if model.mask_captions else None
        conditioning = Conditioning(normal(size, length, model.caption_dim), hidden)
    elif model.condition == "class":
        conditioning = Conditioning(class_B=(uniform(size) * model.classes).long())
    if model.image_channels:
        conditioning = replace(conditioning, image=normal(size, model.image_channels, side, side))
    if model.guidance_input:
        conditioning = replace(conditioning, guidance_B=1 + uniform(size))
    shape, drops_paths = (size, model.in_channels, side, side), method_class(config.tokens).drops_paths
    return TrainingBatch(
        x0=normal(*shape) / 2,
        conditioning=conditioning,
        noise=normal(*shape),
        level_B=normal(size),
        mask_BL=uniform(size, (side // model.patch_size) ** 2),
        path_dropped_B=uniform(size) < config.tokens.path_drop if drops_paths else None,
    )


def profile_steps(
    config: RunConfig,
    stage: StageConfig,
    make_batch: Callable[[int], TrainingBatch],
    steps: int,
    device: torch.device,
    sigma_data: float,
) -> StepProfile:
    """Run some steps as they are, then as many with a look at every operation.

    Args:
        config: the run; its blocks are not compiled.
        stage: learning rate, mask ratio at its start, noise.
        make_batch: the batch of a step, on the device.
        steps: of each kind; one more of each runs first and does not count.
        device: where.
        sigma_data: of the data.

    Returns:
        Means over the steps.
    """
    runner, plain, looked = _Steps(config, stage, device, sigma_data), Ledger(device), Ledger(device)
    whole_s, images, data_s = 0.0, 0, 0.0
    for ledger in (plain, looked):
        for i in range(steps + 1):
            if i == 1:
                ledger.parts.clear()
                whole_s = 0.0 if ledger is plain else whole_s
            start_s = ledger.clock()
            batch = make_batch(i)
            ready_s = ledger.clock()
            runner.step(batch, ledger, look=ledger is looked)
            if ledger is plain:
                whole_s += ledger.clock() - ready_s
            elif i:
                data_s += ready_s - start_s
            images = len(batch.x0)
    found = looked.parts
    # What is not looked into is as fast as in the steps before, which had the machine's caches to themselves.
    found.update({name: plain.parts[name] for name in (CLIP, OPTIMISER, AVERAGES)})
    found[DATA] = PartTime(forward_s=data_s)
    for part in found.values():
        part.forward_s, part.backward_s, part.flops = (
            value / steps for value in (part.forward_s, part.backward_s, part.flops)
        )
    dtype = PRECISIONS[config.precision]
    peak = measured_peak_flops(device, dtype)
    return StepProfile(_ordered(found), whole_s / steps, images, peak)


def _ordered(parts: dict[str, PartTime]) -> dict[str, PartTime]:
    """As in a step: by the first word, then by name."""
    groups = (*ORDER, CLIP, OPTIMISER, AVERAGES, DATA)
    return {name: parts[name] for name in sorted(parts, key=lambda n: (groups.index(n.split(":")[0]), n))}


def profile_recipe(
    config: RunConfig,
    stage: StageConfig,
    size: int,
    steps: int,
    device: torch.device,
    own_data: bool,
    console: Console,
) -> StepProfile:
    """Profile a stage of a recipe, with weights as they are drawn; nothing is kept.

    Args:
        config: the recipe.
        stage: one of its stages.
        size: images at once.
        steps: to look at.
        device: where.
        own_data: read the recipe's data, and time that; else made-up numbers of the same shapes.
        console: where a person reads.

    Returns:
        The profile.

    Raises:
        UserError: if settings, data or shapes do not fit together.
    """
    if not own_data:
        grid = patch_grid(config, stage, CODEC_DOWNSAMPLING[config.data.codec])
        made_up = random_batch(config, size, grid[0] * config.model.patch_size, device)
        sigma_data = config.process.sigma_data or SIGMA_DATA
        return profile_steps(config, stage, lambda _: made_up, steps, device, sigma_data)
    codec = build_codec(config.data, device)
    encoder = build_text_encoder(config.data, device) if config.model.condition == "text" else None
    check_settings(config, codec, encoder)
    cut = stage.model_copy(update={"batch": size})
    with TemporaryDirectory(prefix="shoestring-profile-") as folder:
        data = load_stage(config, cut, codec, encoder, device, Path(folder), console)
        try:
            sigma_data = config.process.sigma_data or data.train.sigma_data()
            batches = lambda i: data.batch(cut, 0, i * size)  # noqa: E731
            return profile_steps(config, stage, batches, steps, device, sigma_data)
        finally:
            data.close()


def profile_table(profile: StepProfile, title: str, own_data: bool) -> Table:
    """A profile for people.

    Args:
        profile: of a step.
        title: above it.
        own_data: whether the data were read; made-up ones say nothing about that.

    Returns:
        The table.
    """
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("part")
    for name in ("forward ms", "backward ms", "share", "GFLOP", "GFLOP/s", "of peak"):
        table.add_column(name, justify="right")
    total_s = sum(part.seconds for name, part in profile.parts.items() if own_data or name != DATA)

    def row(name: str, part: PartTime) -> None:
        rate = part.flops / part.seconds if part.seconds else 0.0
        table.add_row(
            name,
            f"{part.forward_s * 1e3:,.1f}",
            f"{part.backward_s * 1e3:,.1f}" if part.backward_s else "",
            f"{part.seconds / total_s:.1%}",
            f"{part.flops / 1e9:,.1f}" if part.flops else "",
            f"{rate / 1e9:,.0f}" if part.flops else "",
            f"{rate / profile.peak_flops:.1%}" if part.flops else "",
        )

    for name, part in profile.parts.items():
        if name == DATA and not own_data:
            table.add_row(name, "not measured")
        else:
            row(name, part)
    table.add_section()
    parts = [part for name, part in profile.parts.items() if own_data or name != DATA]
    row("all", PartTime(sum(p.forward_s for p in parts), sum(p.backward_s for p in parts), profile.flops))
    rate = profile.flops / profile.whole_s
    table.caption = (
        f"A step of {profile.images} images, uncompiled. Without a look at every operation it takes "
        f"{profile.whole_s * 1e3:,.1f} ms (data left out): {profile.images / profile.whole_s:,.1f} images/s, "
        f"{rate / profile.peak_flops:.1%} of the matmul peak of {profile.peak_flops / 1e9:,.0f} GFLOP/s. "
        "GFLOP: executed in matrix products."
    )
    return table
