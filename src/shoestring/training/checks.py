"""Single checks of a running training: dead parameters, waiting for data, disk, broken records, equal ranks.

None of them costs an ordinary step anything; what is found is a sentence.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from shoestring.config import DataConfig, StageConfig, TokensConfig
from shoestring.runtime import UserError
from shoestring.training.parallel import local
from shoestring.training.step import TrainingBatch

SHOWN = 8
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
"""Weighted sums of all gradients so far, as AdamW and Muon keep them."""
CHUNK = 1 << 20
GOLDEN = -7046029254386353131
"""2^64 divided by the golden ratio, as a signed number: its multiples have bits of all kinds."""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# -- parameters without a gradient -----------------------------------------------------------------------


def gradient_sums(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an optimiser remembers of all gradients of a parameter, by the parameter's name.

    A moment that is exactly zero has never seen a gradient. This tells more than the gradients of one step:
    where output and gates start at zero, nothing before them has a gradient in the first steps.

    Args:
        state: live tensors of the optimisers by ``{parameter}.{key}``; this rank's shards.

    Returns:
        The first moments.
    """
    split = (name.rpartition(".") for name in state)
    return {name: state[f"{name}.{key}"] for name, _, key in split if key in FIRST_MOMENTS}


def dead_parameters(
    gradients: Mapping[str, Tensor | None], total: Callable[[list[float]], list[float]] = list
) -> list[str]:
    """Parameters whose gradient is missing or exactly zero everywhere.

    Args:
        gradients: by name, in the same order on all ranks; see :func:`gradient_sums`.
        total: sums numbers over the ranks, where each has only a shard.

    Returns:
        Names, in their order.
    """
    given = {name: tensor for name, tensor in gradients.items() if tensor is not None}
    if not given:
        return list(gradients)
    flags = torch.stack([tensor.count_nonzero() for tensor in given.values()])
    alive = dict(zip(given, total(flags.double().tolist()), strict=True))
    return [name for name in gradients if not alive.get(name)]


def is_idle(name: str, stage: StageConfig, tokens: TokensConfig) -> bool:
    """Whether a parameter has no gradient for a good reason.

    Mask tokens stand for dropped patches: in a stage that drops none they are not used, except by SPRINT
    where it leaves out whole paths. All else is used in every stage: experts choose their tokens, so each
    has some, and a class table has a gradient as soon as one class was seen.

    Args:
        name: of the parameter.
        stage: the present one.
        tokens: the token method.

    Returns:
        True if nothing is wrong with it.
    """
    drops = stage.mask_ratio > 0 or bool(stage.mask_ratio_end)
    drops = drops or (tokens.method == "sprint" and tokens.path_drop > 0)
    return name.endswith("mask_token") and not drops


def dead_sentence(dead: Sequence[str], step: int, stage: StageConfig, tokens: TokensConfig) -> str | None:
    """What to say of parameters that never had a gradient.

    Args:
        dead: their names; see :func:`dead_parameters`.
        step: of the run; a few steps in, when nothing is zero any more because it began at zero.
        stage: the present one.
        tokens: the token method.

    Returns:
        A sentence, or ``None`` if there is nothing to worry about.
    """
    names = [name for name in dead if not is_idle(name, stage, tokens)]
    if not names:
        return None
    return (
        f"after {step} steps {len(names):,} parameters have not had a gradient other than zero: "
        f"{_listed(names)}; they stay as they were drawn (a part of the network that nothing passes through?)"
    )


# -- data ------------------------------------------------------------------------------------------------


def never_learned(
    state: Mapping[str, Tensor],
    total: Callable[[list[float]], list[float]],
    step: int,
    stage: StageConfig,
    tokens: TokensConfig,
) -> str | None:
    """A sentence on parameters whose gradients have all been zero so far; ``None`` if there are none.

    Args:
        state: of the optimisers, see :func:`gradient_sums`; perhaps shared out over ranks.
        total: sums numbers over the ranks.
        step: of the run.
        stage: the present one.
        tokens: the token method.

    Returns:
        What to say.
    """
    sums = {name: local(tensor) for name, tensor in gradient_sums(state).items()}
    return dead_sentence(dead_parameters(sums, total), step, stage, tokens)


def source_of(data: DataConfig) -> str:
    """Where the data of a run come from, for a sentence: its paths or URLs, else the name of the source."""
    paths = [store.path for store in data.stores] or ([data.path] if data.path else [])
    return _listed(paths) if paths else f"data.source={data.source}"


class DataWatch:
    """Names what is being waited for when the next batch does not come; used around getting it.

    Args:
        source: the sentence names it; see :func:`source_of`.
        stall_s: seconds until the first sentence; each further one takes twice as long as the one before.
        say: called with the sentence, in another thread.
    """

    def __init__(self, source: str, stall_s: float, say: Callable[[str], object]) -> None:
        self.source, self.stall_s, self.say = source, stall_s, say
        self.waited_s = 0.0
        """Time spent inside so far; may be set back to zero."""
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._began_s: float | None = None

    def seconds(self) -> float:
        """How long the present wait has lasted; 0 outside."""
        return 0.0 if self._began_s is None else time.perf_counter() - self._began_s

    def __enter__(self) -> DataWatch:
        self._began_s = time.perf_counter()
        with self._lock:
            self._arm(self.stall_s)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            assert self._timer is not None
            self._timer.cancel()
            self._timer = None
        seconds, self._began_s = self.seconds(), None
        self.waited_s += seconds

    def _arm(self, wait_s: float) -> None:
        self._timer = threading.Timer(wait_s, self._fire, (wait_s,))
        self._timer.daemon = True  # a wait that never ends must not keep an ended process
        self._timer.start()

    def _fire(self, waited_s: float) -> None:
        with self._lock:
            if self._timer is not threading.current_thread():
                return  # the batch has come meanwhile
            self._arm(2 * waited_s)
        self.say(
            f"waiting for data for {self.seconds():,.0f} s: {self.source} does not give the next batch; "
            "training goes on as soon as it does (is the disk or the network slow, or gone?)"
        )


def non_finite_records(batch: TrainingBatch, name: Callable[[int], str]) -> list[str]:
    """The records of a batch whose latents or caption embeddings hold NaN or infinity.

    Args:
        batch: of a step whose loss was not finite.
        name: what a row of the batch is called, e.g. ``record r000031 of /data/store``; asked for bad rows
            only.

    Returns:
        For each bad row its name and what is wrong; empty = the data are not to blame.
    """
    columns = {"latents": batch.x0, "caption embedding": batch.conditioning.text_BSD}
    found: dict[int, str] = {}
    for what, tensor in columns.items():
        if tensor is not None:
            bad_B = ~tensor.isfinite().flatten(1).all(1)
            found |= {row: what for row in bad_B.nonzero().flatten().tolist() if row not in found}
    return [f"{name(row)} holds NaN or infinity ({found[row]})" for row in sorted(found)]


# -- disk ------------------------------------------------------------------------------------------------


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin a checkpoint that the disk has no room for.

    Args:
        folder: where it goes; need not exist yet.
        needed_bytes: its size.

    Raises:
        UserError: saying what is needed and what is free.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise UserError(
            f"the disk of {folder} has {free / 1e9:,.2f} GB free, the next checkpoint needs "
            f"{needed_bytes / 1e9:,.2f} GB; free some space (or lower logging.keep_checkpoints) and give the "
            "same command again"
        )


# -- equal ranks -----------------------------------------------------------------------------------------


@torch.no_grad()
def digests(tensors: Sequence[Tensor]) -> Tensor:
    """A number for the exact bits of each tensor; ranks that hold copies must have the same numbers.

    The bits of the values as integers times constants of their places, summed modulo 2^64: exact in any order
    of summation, and computed where the tensors are.

    Args:
        tensors: of any dtype; they are not changed.

    Returns:
        int64, one number a tensor.
    """
    return torch.stack([_digest(tensor) for tensor in tensors])


def _digest(tensor: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits_N = tensor.detach().contiguous().flatten().view(integers[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits_N.numel(), CHUNK):  # so that little memory is needed
        part = bits_N[start : start + CHUNK].long()
        place = torch.arange(start, start + len(part), device=part.device)
        total += (part * (place * GOLDEN | 1)).sum()
    return total


def rank_divergence(
    names: Sequence[str], of_ranks: Sequence[Sequence[int]], ranks: Sequence[int] | None = None
) -> str | None:
    """Compare the digests of copies that should be equal.

    Args:
        names: of the tensors.
        of_ranks: their digests, a sequence for each rank.
        ranks: which ranks these are; ``None`` = all, in order.

    Returns:
        A sentence that names what differs and where, or ``None``.
    """
    apart = [
        name for name, column in zip(names, zip(*of_ranks, strict=True), strict=True) if len({*column}) > 1
    ]
    if not apart:
        return None
    rows = [tuple(row) for row in of_ranks]
    usual = max(rows, key=rows.count)
    numbers = ranks if ranks is not None else range(len(rows))
    odd = [str(rank) for rank, row in zip(numbers, rows, strict=True) if row != usual]
    return (
        f"the ranks no longer hold the same weights: {len(apart):,} of {len(names):,} parameters differ, "
        f"first {_listed(apart)} (rank {', '.join(odd)} against the others); this is a fault of memory, "
        "network or software; if it comes back, leave out the machine of that rank"
    )
