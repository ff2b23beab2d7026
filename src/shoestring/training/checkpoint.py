"""Checkpoints: a folder that is there whole or not at all.

``checkpoints/000012800/`` holds

* ``state/``: all tensors of the run (weights, moments, averages), as ``torch.distributed.checkpoint`` writes
  them: every rank its part, readable by any number of ranks;
* ``weights.safetensors``, ``ema.safetensors``, ``power-0.05.safetensors``: model files that
  ``shoestring sample`` reads;
* ``complete.json``, written last: counters, versions, size and checksum of every file, and its own digest.

It is written under a temporary name and renamed when complete: killed at any moment, the one before is
whole. The tensors are copied when a save begins; writing goes on beside the next steps.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from shoestring.config import RunConfig
from shoestring.models.files import ModelFacts, save_model
from shoestring.models.network import BaseNetwork
from shoestring.runtime import UserError
from shoestring.training.averages import CLASSIC, Averages
from shoestring.training.folder import checkpoint_folders
from shoestring.training.guard import GuardState
from shoestring.training.mark import Damaged, fingerprint, kept_forever, mark_or_damage, problem, write_mark
from shoestring.training.optim import Optimizers
from shoestring.training.parallel import Parallel

# A run of one process is no mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

STATE, WEIGHTS, AVERAGE = "state", "weights.safetensors", "ema.safetensors"
SNAPSHOTS = "snapshots"
"""Folder of a run that keeps the power-function averages of deleted checkpoints."""


@dataclass
class Counters:
    """Where a run is; together with the configuration this determines everything that comes."""

    nimg: int = 0
    """Images seen."""
    step: int = 0
    elapsed_s: float = 0.0
    """Time spent training, interruptions left out."""
    training_flops: float = 0.0
    guard: GuardState = field(default_factory=GuardState)


@dataclass(frozen=True)
class Trained:
    """Everything of a run that is learned."""

    network: BaseNetwork
    optimizers: Optimizers
    averages: Averages

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by name; writing into them restores a run."""
        weights = {f"weights.{name}": p.detach() for name, p in self.network.named_parameters()}
        moments = {f"optimizer.{name}": tensor for name, tensor in self.optimizers.tensors().items()}
        averages = {f"averages.{name}": tensor for name, tensor in self.averages.tensors().items()}
        return weights | moments | averages


def forecast_bytes(trained: Trained) -> int:
    """Size of a checkpoint in bytes: the state, and a model file of the weights and of each average."""
    state = sum(tensor.numel() * tensor.element_size() for tensor in trained.tensors().values())
    weights = sum(p.numel() * p.element_size() for p in trained.network.parameters())
    averages = sum(tensor.numel() * tensor.element_size() for tensor in trained.averages.tensors().values())
    return state + weights + averages


class Checkpoints:
    """Saves and restores the checkpoints of a run, one save at a time.

    Args:
        run: run folder.
        trained: what to save and restore.
        config: of the run.
        parallel: this process among the others.
    """

    def __init__(self, run: Path, trained: Trained, config: RunConfig, parallel: Parallel) -> None:
        self.run, self.trained, self.config, self.parallel = run, trained, config, parallel
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        self._trusted_nimg: int | None = None
        # Noted now: the thread that writes would see the copies in low precision that a step computes with.
        self._weights = {name: (p.shape, p.dtype) for name, p in trained.network.named_parameters()}
        self._group: dict[str, Any] = {"no_dist": True}
        if parallel.ranks > 1:
            self._group = {"process_group": parallel.files}

    # -- saving ------------------------------------------------------------------------------------------

    def save(
        self,
        counters: Counters,
        facts: dict[str, Any],
        keep_forever: bool = False,
        trusted_nimg: int | None = None,
    ) -> None:
        """Copy the state and begin to write it; the files appear beside the next steps.

        Args:
            counters: where the run is.
            facts: fields of :class:`ModelFacts` beside ``nimg`` and ``weights``.
            keep_forever: not to be deleted when newer ones are there.
            trusted_nimg: while things look bad, the newest that is no newer than this is not deleted either.

        Raises:
            UserError: if the save before this one failed.
        """
        self.wait()
        name = f"{counters.nimg:09d}"
        folder = self.run / "checkpoints" / name
        if self.parallel.from_first(folder.exists):  # e.g. at a stage's end: nothing can differ
            return
        temporary = folder.with_name(f".{name}.part")
        self.parallel.from_first(lambda: _empty(temporary))
        writer = FileSystemWriter(temporary / STATE, single_file_per_rank=True, sync_files=True)
        written = async_save(self.trained.tensors(), storage_writer=writer, **self._group)
        mark = {
            "ranks": self.parallel.ranks,
            "sharding": self.parallel.sharding,
            "counters": asdict(counters),
            "facts": facts,
            "keep_forever": keep_forever,
        }
        self._trusted_nimg = trusted_nimg
        finish = self._finish if self.parallel.first else (lambda *_: None)
        self._saving = self._thread.submit(_afterwards, written, finish, folder, temporary, mark)

    def wait(self) -> None:
        """Wait for the save that was begun.

        Raises:
            UserError: if it failed; older checkpoints are untouched.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        error: UserError | None = None
        try:
            saving.result()
        except UserError as mistake:
            error = mistake
        # The first rank may have failed after the others were done.
        if self.parallel.largest(int(error is not None)) and error is None:
            raise UserError("another rank could not write its part of the checkpoint")
        if error is not None:
            raise error

    def close(self) -> None:
        """End the thread; a save that was begun is finished first."""
        self._thread.shutdown()

    def _finish(self, folder: Path, temporary: Path, mark: dict[str, Any]) -> None:
        """On the first rank, when all ranks have written: model files, mark, name, deletion of old ones."""
        facts, nimg = mark["facts"], int(folder.name)
        self._model_file(temporary / WEIGHTS, "weights.", ModelFacts(nimg, "trained", **facts))
        for track in self.trained.averages.tracks:
            name = AVERAGE if track == CLASSIC else f"{track}.safetensors"
            kind = "ema" if track == CLASSIC else track
            self._model_file(temporary / name, f"averages.{track}.", ModelFacts(nimg, kind, **facts))
        files = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
        for file in files:
            _flush(file)
        listed = {str(file.relative_to(temporary)): fingerprint(file) for file in files}
        write_mark(temporary, mark | {"files": listed})
        _flush(temporary)
        temporary.rename(folder)
        _flush(folder.parent)
        self._delete_old()

    def _model_file(self, path: Path, prefix: str, facts: ModelFacts) -> None:
        """A model file of what has just been written: read back from there, so that this too is tried."""
        own = self._weights.items()
        tensors = {f"{prefix}{name}": torch.empty(shape, dtype=dtype) for name, (shape, dtype) in own}
        if prefix != "weights.":
            tensors = {name: tensor.float() for name, tensor in tensors.items()}
        load(tensors, storage_reader=FileSystemReader(path.parent / STATE), no_dist=True)
        named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        save_model(path, named, self.config, facts)

    def _delete_old(self) -> None:
        """All but the last ones and those to be kept; their power-function averages stay."""
        folders = [folder for folder in checkpoint_folders(self.run) if not kept_forever(folder)]
        trusted = [f for f in folders if self._trusted_nimg is not None and int(f.name) <= self._trusted_nimg]
        for old in folders[: -self.config.logging.keep_checkpoints]:
            if trusted and old == trusted[-1]:
                continue
            gone = old.with_name(f".{old.name}.old")  # half deleted it must not look like a checkpoint
            shutil.rmtree(gone, ignore_errors=True)
            old.rename(gone)
            self._discard(gone)

    def _discard(self, gone: Path) -> None:
        """Delete a checkpoint that has been renamed; its power-function averages move out first.

        What the disk does not allow now is done when the run is started the next time.
        """
        with suppress(OSError):
            for average in gone.glob("power-*.safetensors"):
                kept = self.run / SNAPSHOTS / gone.stem.removeprefix(".") / average.name
                kept.parent.mkdir(parents=True, exist_ok=True)
                average.replace(kept)
            shutil.rmtree(gone)

    # -- restoring ---------------------------------------------------------------------------------------

    def tidy(self) -> None:
        """Remove what an interrupted save or deletion has left."""
        for rest in (self.run / "checkpoints").glob(".*"):
            if rest.suffix == ".old":
                self._discard(rest)
            elif rest.suffix == ".part":
                shutil.rmtree(rest, ignore_errors=True)

    def restore(self, folder: Path) -> tuple[Counters, dict[str, Any]]:
        """Go back to a checkpoint; all ranks together.

        Args:
            folder: of this run.

        Returns:
            Counters, and the facts that were given to :meth:`save`.

        Raises:
            Damaged: if it is not what was written; the tensors may be half of this and half of that, and
                another checkpoint must be restored.
            UserError: if it is of another model, or of a newer version; nothing was restored.
        """
        mark = self.parallel.from_first(lambda: mark_or_damage(folder))
        if isinstance(mark, Damaged):
            raise mark
        self._check_files(folder, mark)
        tensors = self.trained.tensors()
        # Its metadata is pickled: checkpoints are opened in one's own run folders only, and published weights
        # are safetensors.
        reader = FileSystemReader(folder / STATE)
        stored: dict[str, Any] = {}

        def look() -> None:
            for name, meta in reader.read_metadata().state_dict_metadata.items():
                if isinstance(meta, TensorStorageMetadata):
                    stored[name] = meta.size

        self._all_can(look, folder)
        foreign = _difference({name: tensor.shape for name, tensor in tensors.items()}, stored)
        if foreign is not None:  # on all ranks
            raise self.parallel.mistake(
                f"checkpoint {folder} is of another model ({foreign}); choose another folder with --out"
            )
        self._all_can(lambda: load(tensors, storage_reader=reader, **self._group), folder)
        counters = dict(mark["counters"])
        counters["guard"] = GuardState(**counters["guard"])
        return Counters(**counters), mark["facts"]

    def _all_can(self, read: Callable[[], None], folder: Path) -> None:
        """Read something; where a rank cannot, none goes on to what they do together."""
        damaged: str | None = None
        try:
            read()
        except (Exception, CheckpointException) as error:  # half a dozen types mean a damaged file
            damaged = str(error).splitlines()[0] if str(error) else type(error).__name__
        if self.parallel.largest(int(damaged is not None)):
            raise Damaged(f"checkpoint {folder} is damaged ({damaged or 'another rank could not read it'})")

    def _check_files(self, folder: Path, mark: dict[str, Any]) -> None:
        """Sizes and digests, the files shared among the ranks."""
        mine = sorted(mark["files"])[self.parallel.rank :: self.parallel.ranks]
        found = [problem(folder / name, mark["files"][name]) for name in mine]
        problems = [each for part in self.parallel.gathered(found) for each in part if each is not None]
        if problems:
            raise Damaged(f"checkpoint {folder} is damaged ({problems[0]})")


def _afterwards(
    written: Any,
    finish: Callable[[Path, Path, dict[str, Any]], None],
    folder: Path,
    temporary: Path,
    mark: dict[str, Any],
) -> None:
    """In the thread: wait for the tensors, then finish; whatever fails is one sentence."""
    try:
        written.result()
        finish(folder, temporary, mark)
    except (Exception, CheckpointException) as error:  # torch's own is no Exception
        shutil.rmtree(temporary, ignore_errors=True)
        reason = _innermost(error)
        raise UserError(
            f"cannot write checkpoint {folder} ({reason}); free some space and give the same command again"
        ) from error


def _innermost(error: BaseException) -> str:
    """The words of what went wrong first; torch wraps the errors of all ranks into one."""
    failures = getattr(error, "failures", None)
    if failures:
        wrapped = next(iter(failures.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    words = getattr(error, "strerror", None) or str(error)
    return words.splitlines()[0] if words else type(error).__name__


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """The first tensor that only one side has, or that has another shape."""
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            return f"{name} is {'missing' if name in ours else 'unexpected'}"
        if tuple(ours[name]) != tuple(theirs[name]):
            return f"{name} has shape {list(theirs[name])}, this model needs {list(ours[name])}"
    return None


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write checkpoint {folder} ({error.strerror}); free some space") from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
