"""Steps that fit into memory: how many images go through the network at once."""

from __future__ import annotations

import torch

from shoestring.runtime import OutOfMemory
from shoestring.training.record import Record
from shoestring.training.schedule import Position
from shoestring.training.setup import Setup
from shoestring.training.stage_data import StageData
from shoestring.training.step import Learner, StepResult, TrainingBatch, accumulate_gradient, update


class FittingSteps:
    """Takes steps with as many images at once as fit.

    Args:
        setup: finds and notes the number, and fits the network to it.
        learner: changed by every step.
        record: where it is said that the number was too large.
    """

    def __init__(self, setup: Setup, learner: Learner, record: Record) -> None:
        self.setup, self.learner, self.record, self.parallel = setup, learner, record, setup.parallel
        self._stage, self._micro_batch = -1, 0

    def enter(self, here: Position, data: StageData, held_bytes: int) -> None:
        """Be ready for the stage; nothing happens while it is the same.

        Args:
            here: where in the run.
            data: of the stage.
            held_bytes: of weights, moments and averages.

        Raises:
            UserError: if not even one image fits.
        """
        if here.index == self._stage:
            return
        self._micro_batch = self.setup.micro_batch(here.stage, held_bytes, self.learner.workers.count)
        self._stage, self._data = here.index, data
        self.setup.fit_to_stage(self.learner, here.stage, data, self._micro_batch)

    def step(self, batch: TrainingBatch, lr: float, mask_ratio: float, here: Position) -> StepResult:
        """One step, with fewer images at once if their gradient does not fit.

        Args:
            batch: this rank's share.
            lr: learning rate.
            mask_ratio: share of patches dropped.
            here: where in the run.

        Returns:
            The loss and the gradient norm.

        Raises:
            OutOfMemory: if other ranks wait for this one, or if memory ran out in the middle of the update,
                so that the run has to start again from its last checkpoint.
            UserError: if there was only one image at once.
        """
        while True:
            try:
                loss = accumulate_gradient(self.learner, batch, self._micro_batch, here.stage, mask_ratio)
                break
            except torch.OutOfMemoryError as error:
                self.learner.optimizers.zero_grad()
                text = self._halve(here)
                if self.parallel.ranks > 1:
                    raise OutOfMemory(f"rank {self.parallel.rank} is {text}") from error
            # Not while the error is handled: it holds on to what the failed step has allocated.
            self.record.event("out-of-memory", text)
            if self.parallel.device.type == "cuda":
                torch.cuda.empty_cache()
            self.setup.fit_to_stage(self.learner, here.stage, self._data, self._micro_batch)
        try:
            return update(self.learner, loss, lr, here)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"rank {self.parallel.rank}, while it updated the weights, was {self._halve(here)}; the same "
                "command goes on from the last checkpoint"
            ) from error

    def _halve(self, here: Position) -> str:
        """Half as many images at once from now on; what there is to say about it."""
        tried = self._micro_batch
        self._micro_batch = self.setup.smaller_micro_batch(here.stage, tried)
        return f"out of memory with {tried} images at once; going on with {self._micro_batch}"
