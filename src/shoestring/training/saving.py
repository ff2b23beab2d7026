"""When a run saves: what is checked before, and what is said when it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoestring.runtime import TrainingFailed, UserError
from shoestring.training.checkpoint import Checkpoints, Counters, forecast_bytes
from shoestring.training.checks import check_disk, digests, rank_divergence
from shoestring.training.parallel import local

Tell = Callable[[str, str], None]
"""Kind of an event and a sentence."""


class Saver:
    """Saves a run; a checkpoint that cannot be written does not stop it, the last one excepted.

    Args:
        checkpoints: of the run.
        tell: event and sentence to whoever reads.
    """

    def __init__(self, checkpoints: Checkpoints, tell: Tell) -> None:
        self.checkpoints, self.tell = checkpoints, tell
        self.bytes = forecast_bytes(checkpoints.trained)
        tensors = checkpoints.trained.tensors().values()
        self.held_bytes = sum(local(tensor).nbytes for tensor in tensors)
        """What weights, moments and averages take on this rank."""

    def save(
        self,
        counters: Counters,
        facts: dict[str, Any],
        keep_forever: bool = False,
        trusted_nimg: int | None = None,
    ) -> bool:
        """Begin a checkpoint.

        Args:
            counters: where the run is.
            facts: of the model, see :meth:`Checkpoints.save`.
            keep_forever: not to be deleted when newer ones are there.
            trusted_nimg: see :meth:`Checkpoints.save`.

        Returns:
            False if it could not be begun.

        Raises:
            TrainingFailed: if the ranks' weights differ.
        """
        self.finish()
        self._check_ranks_agree(counters.nimg)
        parallel, run = self.checkpoints.parallel, self.checkpoints.run
        try:
            parallel.from_first(lambda: check_disk(run, self.bytes))
            self.checkpoints.save(counters, facts, keep_forever, trusted_nimg)
        except UserError as error:
            self._failed(error)
            return False
        return True

    def finish(self) -> bool:
        """Wait for the checkpoint that is being written; whether all is well."""
        try:
            self.checkpoints.wait()
        except UserError as error:
            self._failed(error)
            return False
        return True

    def save_at_last(self, counters: Counters, facts: dict[str, Any]) -> None:
        """The checkpoint of the end or of an interruption, which must not fail.

        Args:
            counters: where the run is.
            facts: of the model.

        Raises:
            UserError: if it cannot be written.
        """
        if not (self.save(counters, facts) and self.finish()):
            raise UserError(
                f"the last checkpoint of {self.checkpoints.run} could not be written; free some space and give "
                "the same command again: it goes on from the newest one that is whole"
            )

    def forecast(self, folder: Path, milestones: int) -> str:
        """A sentence on what the checkpoints of a run will take.

        Args:
            folder: of the run, for the sentence.
            milestones: checkpoints that are kept for good.
        """
        kept = self.checkpoints.config.logging.keep_checkpoints
        total = self.bytes * (kept + 1 + milestones)  # one more while it is written
        return (
            f"A checkpoint takes {_size(self.bytes)}; {folder} will need up to {_size(total)} for "
            f"{kept + milestones} of them and one that is being written"
        )

    def _failed(self, error: UserError) -> None:
        self.tell("not-saved", f"{error}; training goes on and tries again at the next checkpoint")

    def _check_ranks_agree(self, nimg: int) -> None:
        """Copies of the network must be equal, bit for bit."""
        parallel, network = self.checkpoints.parallel, self.checkpoints.trained.network
        if parallel.sharding != "ddp":
            return
        names = [name for name, _ in network.named_parameters()]
        mine = digests([p.detach() for p in network.parameters()]).tolist()
        sentence = rank_divergence(names, parallel.gathered(mine))
        if sentence is not None:
            raise TrainingFailed(
                f"{sentence}, at image {nimg:,}; nothing was saved, the same command goes on from the "
                "checkpoint before"
            )


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
