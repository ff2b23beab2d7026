"""What a run is made of, put together from its recipe; all ranks together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from shoestring.config import RunConfig, StageConfig
from shoestring.diffusion.process import build_process
from shoestring.evaluation.digests import file_digest
from shoestring.interfaces import ImageCodec, TextEncoder
from shoestring.models.files import build_network
from shoestring.models.lora import train_factors_only
from shoestring.models.network import BaseNetwork
from shoestring.models.transformer import DiffusionTransformer
from shoestring.planning import fitting_micro_batch, measured_peak_flops
from shoestring.runtime import PRECISIONS, UserError, Workers, default_workers, say, stream
from shoestring.training.compiling import compile_blocks
from shoestring.training.distilling import Distillation, check_teacher
from shoestring.training.folder import MACHINE, remember
from shoestring.training.optim import Optimizers
from shoestring.training.parallel import Parallel
from shoestring.training.stage_data import StageData, load_stage
from shoestring.training.starting import begun, initial_weights
from shoestring.training.step import Learner, part_sizes
from shoestring.training.step_shapes import stage_shapes
from shoestring.training.timed_attention import attention_sentence, choose_attention

SPARE = 0.9
"""Share of the free memory that a forecast may fill."""


class Setup:
    """Makes the parts of a run.

    Args:
        config: what to do.
        folder: run folder; what is chosen by timing or by memory is kept there, and used again on resume.
        console: where a person reads.
        parallel: this process among those of the run.
    """

    def __init__(self, config: RunConfig, folder: Path, console: Console, parallel: Parallel) -> None:
        self.config, self.folder, self.console, self.parallel = config, folder, console, parallel

    def remembered(self, key: str, compute: Callable[[], Any]) -> Any:
        """A value that is computed once for the run folder, on the first rank, and is the same on all."""
        return self.parallel.from_first(lambda: remember(self.folder / MACHINE, key, compute))

    def data(self, stage: StageConfig, codec: ImageCodec, text_encoder: TextEncoder | None) -> StageData:
        """The data of a stage: the first rank prepares what is not there yet, the others find it."""
        loaded: list[StageData] = []

        def load() -> None:
            loaded.append(
                load_stage(
                    self.config, stage, codec, text_encoder, self.parallel.device, self.folder, self.console
                )
            )

        self.parallel.from_first(load)
        if not self.parallel.first:
            load()
        return loaded[0]

    def network(self) -> BaseNetwork:
        """Make the network.

        Returns:
            With the weights that the run begins with, on the CPU.

        Raises:
            UserError: if they are to be read from a file that does not fit, or a teacher does not.
        """
        network = build_network(self.config, stream(self.config.seed, "init"))
        if not self.parallel.from_first(lambda: begun(self.folder)):
            initial_weights(self.config, network)
        if self.config.distill is not None:
            self.parallel.from_first(lambda: check_teacher(self.config))
        train_factors_only(network)
        return network

    def learner(self, network: BaseNetwork, sigma_data: float) -> Learner:
        """Network, optimisers and averages at the beginning; the network moves to its device."""
        config, parallel = self.config, self.parallel
        network.to(parallel.device)
        precision = PRECISIONS[config.precision]
        process = build_process(config.process, sigma_data)
        # Part of what determines the bits of a run, so it is kept with it. A rank has one thread of work.
        key, device = f"workers_{parallel.device.type}", parallel.device
        if device.type == "cpu":  # sums that threads share are other sums with more of them
            threads = f"threads_{parallel.ranks}" if parallel.ranks > 1 else key
            torch.set_num_threads(self.remembered(threads, torch.get_num_threads))
        count = self.remembered(key, lambda: default_workers(device)) if parallel.ranks == 1 else 1
        optimizer, workers = config.optimizer, Workers(count)
        learner = Learner.build(
            network, config.tokens, process, optimizer, workers, parallel, precision, config.power_ema
        )
        if config.distill is not None:
            self._same_teacher(check_teacher(config))
            learner.objective = Distillation(
                config, process, sigma_data, network, learner.averages, parallel.device
            )
        return learner

    def _same_teacher(self, path: Path) -> None:
        """A run goes on with the teacher it began with, or not at all."""
        here: str = self.parallel.from_first(lambda: file_digest(path))
        before = self.remembered("teacher", lambda: here)
        if before != here:
            raise self.parallel.mistake(
                f"distill.teacher: {path} has other weights than when {self.folder} was begun; put the old "
                "file back, or begin in another folder with --out"
            )

    def fit_to_stage(self, learner: Learner, stage: StageConfig, data: StageData, micro_batch: int) -> None:
        """Choose the attention of a stage's shapes (on a CPU, by timing) and compile the blocks for them.

        Args:
            learner: its network is prepared.
            stage: about to begin.
            data: of the stage.
            micro_batch: images at once on this rank.
        """
        config, network = self.config, learner.model
        share = stage.batch // self.parallel.ranks
        images = part_sizes(share, micro_batch, learner.workers.count)
        shapes = [shape for grid in data.grids for shape in stage_shapes(config, stage, grid, images)]
        if not isinstance(network, DiffusionTransformer):
            return
        model = network.config
        if self.parallel.device.type == "cpu" and model.attention == "auto":
            dtype = PRECISIONS[config.precision]
            choices = self.remembered(
                f"attention_{stage.name}_{config.precision}",
                lambda: choose_attention(model, config.tokens, shapes, dtype, learner.workers),
            )
            network.use_attention(choices)
            say(self.console, attention_sentence(choices))
        if config.compile:
            compile_blocks(network, config.tokens, shapes)

    @torch.no_grad()
    def begin_anew(self, learner: Learner) -> None:
        """The weights of the beginning again, and nothing that was learned since.

        Args:
            learner: changed in place.
        """
        network = build_network(self.config, stream(self.config.seed, "init"))
        initial_weights(self.config, network)
        fresh = dict(network.named_parameters())
        for name, parameter in learner.model.named_parameters():
            self.parallel.put(parameter, fresh[name])
            for track in learner.averages.tracks:
                learner.averages.named(track)[name].copy_(parameter)
        forget(learner.optimizers)

    def peak_flops(self) -> float:
        """Matmul peak of all ranks together: measured once on the first."""
        device, precision = self.parallel.device, self.config.precision
        with self.console.status("Measuring the machine"):
            key = f"matmul_flops_{precision}_{device.type}"
            one: float = self.remembered(key, lambda: measured_peak_flops(device, PRECISIONS[precision]))
        return one * self.parallel.ranks

    def micro_batch(self, stage: StageConfig, held: int, workers: int) -> int:
        """Images at once on this rank: as the recipe says, else what fits by the forecast of memory.

        Args:
            stage: the stage.
            held: bytes of weights, moments and averages that are there already; the forecast counts them too.
            workers: threads of this rank.

        Returns:
            A divisor of the rank's share of the batch.

        Raises:
            UserError: if not even one image fits.
        """
        share = stage.batch // self.parallel.ranks

        def fitting() -> int:
            if stage.micro_batch is not None:
                return min(stage.micro_batch, share)
            return fitting_micro_batch(
                self.config,
                stage,
                int(SPARE * (free_memory(self.parallel) + held)),
                self.parallel.ranks,
                self.parallel.sharding,
                shard_ranks=self.config.parallel.shard_ranks,
                device_type="cuda" if self.parallel.device.type == "cuda" else "cpu",
                workers=workers,
            )

        chosen: int = self.remembered(self._micro_batch_key(stage), fitting)
        if stage.micro_batch is None and chosen < share:
            say(self.console, f"stage {stage.name!r}: {chosen} of {share} images at once fit into memory")
        return chosen

    def smaller_micro_batch(self, stage: StageConfig, micro_batch: int) -> int:
        """Half as many images at once, noted for this run folder.

        Args:
            stage: the stage.
            micro_batch: too many.

        Returns:
            The number.

        Raises:
            UserError: if there was one only.
        """
        if micro_batch == 1:
            raise UserError(
                f"stage {stage.name!r}: not even one image fits into the memory of a rank; set "
                "model.checkpoint_activations=true, or parallel.sharding=fsdp on several GPUs, or take a "
                "smaller model"
            )
        smaller = micro_batch // 2
        remember(self.folder / MACHINE, self._micro_batch_key(stage), lambda: smaller, anew=True)
        return smaller

    def _micro_batch_key(self, stage: StageConfig) -> str:
        asked = "" if stage.micro_batch is None else f"_of_{stage.micro_batch}"
        return f"micro_batch_{stage.name}_{self.parallel.device.type}_{self.parallel.ranks}{asked}"


def free_memory(parallel: Parallel) -> float:
    """Bytes that one rank may still take on its device."""
    if parallel.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(parallel.device)
        # What the stage before has left with torch is there to be used again.
        left = torch.cuda.memory_reserved(parallel.device) - torch.cuda.memory_allocated(parallel.device)
        return float(free + left)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float(sys.maxsize)  # not Linux: not known
    available = next((line for line in lines if line.startswith("MemAvailable")), None)
    return float(sys.maxsize) if available is None else float(available.split()[1]) * 1024 / parallel.ranks


@torch.no_grad()
def forget(optimizers: Optimizers) -> None:
    """Drop all moments, as at the beginning."""
    for tensor in optimizers.tensors().values():
        tensor.zero_()
