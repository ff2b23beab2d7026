"""When a run saves: what is checked before, and what is said when it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoestring.config import LoggingConfig, RunConfig
from shoestring.runtime import TrainingFailed, UserError
from shoestring.training.checkpoint import Checkpoints, Counters, forecast_bytes
from shoestring.training.checks import check_disk, digests, rank_divergence
from shoestring.training.parallel import local

Tell = Callable[[str, str], None]
"""Kind of an event and a sentence."""


def due(logging: LoggingConfig, nimg: int, batch: int, last: bool) -> tuple[bool, bool]:
    """Whether a checkpoint is due after a step, and whether it is a milestone, which is kept for good.

    Args:
        logging: how often.
        nimg: images seen after the step.
        batch: images of the step.
        last: whether it was the last one of its stage.

    Returns:
        Both answers.
    """

    def crossed(interval: int) -> bool:
        return nimg // interval > (nimg - batch) // interval

    every = logging.milestone_nimg
    milestone = every is not None and (last or crossed(every))
    return milestone or last or crossed(logging.checkpoint_nimg), milestone


def milestones_of(config: RunConfig) -> list[bool]:
    """For each checkpoint of an undisturbed run, whether it is a milestone."""
    found, nimg = [], 0
    for stage in config.stages:
        for step in range(stage.steps):
            nimg += stage.batch
            wanted, milestone = due(config.logging, nimg, stage.batch, step == stage.steps - 1)
            if wanted:
                found.append(milestone)
    return found


class Saver:
    """Saves a run; a checkpoint that cannot be written does not stop it, the last one excepted.

    Args:
        checkpoints: of the run.
        tell: event and sentence to whoever reads.
    """

    def __init__(self, checkpoints: Checkpoints, tell: Tell) -> None:
        self.checkpoints, self.tell = checkpoints, tell
        self.bytes = forecast_bytes(checkpoints.trained)
        averages = checkpoints.trained.averages.tensors()
        self.power_bytes = sum(t.numel() * 4 for name, t in averages.items() if name.startswith("power-"))
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

    def save_at_last(
        self, counters: Counters, facts: dict[str, Any], trusted_nimg: int | None = None
    ) -> None:
        """The checkpoint of the end or of an interruption, which must not fail.

        Args:
            counters: where the run is.
            facts: of the model.
            trusted_nimg: see :meth:`Checkpoints.save`.

        Raises:
            UserError: if it cannot be written.
        """
        if not (self.save(counters, facts, trusted_nimg=trusted_nimg) and self.finish()):
            raise self.checkpoints.parallel.mistake(
                f"the last checkpoint of {self.checkpoints.run} could not be written; free some space and "
                "give the same command again: it goes on from the newest one that is whole"
            )

    def forecast(self, folder: Path) -> str:
        """A sentence on what the checkpoints of a run will take.

        Args:
            folder: of the run, for the sentence.

        Returns:
            What to say at the start.
        """
        logging, milestones = self.checkpoints.config.logging, milestones_of(self.checkpoints.config)
        kept = min(logging.keep_checkpoints, milestones.count(False)) + milestones.count(True)
        snapshots = self.power_bytes * (len(milestones) - kept)
        total = self.bytes * min(kept + 1, len(milestones)) + snapshots
        extra = f", and {_size(snapshots)} of averages out of deleted ones" if snapshots else ""
        return (
            f"A checkpoint takes {_size(self.bytes)}; {folder} will need up to {_size(total)}: {kept} of them"
            f"{extra}, while the next one is written"
        )

    def _failed(self, error: UserError) -> None:
        self.tell("not-saved", f"{error}; training goes on and tries again at the next checkpoint")

    def _check_ranks_agree(self, nimg: int) -> None:
        """Copies of the network must be equal, bit for bit."""
        parallel, network = self.checkpoints.parallel, self.checkpoints.trained.network
        groups = [group for group in parallel.copies if len(group) > 1]
        if not groups:
            return
        names = [name for name, _ in network.named_parameters()]
        of_ranks = parallel.gathered(digests([local(p.detach()) for p in network.parameters()]).tolist())
        for group in groups:
            sentence = rank_divergence(names, [of_ranks[rank] for rank in group], group)
            if sentence is not None:
                raise TrainingFailed(
                    f"{sentence}, at image {nimg:,}; nothing was saved, the same command goes on from the "
                    "checkpoint before"
                )


class UnlessFull:
    """A full disk does not stop the training: rows of the log and pictures are missing then.

    Used around writing them, which only the first rank does: the others would wait for it. Whether
    checkpoints can be written is another matter.

    Args:
        say: called with a sentence, once until something could be written again.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self.say, self._said = say, False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside the block, what cannot be written is left out."""
        try:
            yield
        except UserError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            if not self._said:
                self.say(f"{str(error).partition(';')[0]}; training goes on without")
            self._said = True
        else:
            self._said = False


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
