"""Guard rails of a run: what its losses and gradient norms say, and what is to be done about it.

Plain arithmetic on numbers that all ranks share, so that all come to the same verdict; the loop carries it
out. Nothing here depends on how often it is asked: one step at a time or many at once give the same.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from shoestring.config import GuardConfig, StageConfig
from shoestring.training.schedule import Position

NARROWEST = 0.05
"""The losses of large batches hardly differ; they are taken to vary by at least 5 %."""
LASTING = 2.0
"""A stretch of losses is too high at so many times the best one before, and beyond three spreads of it."""
EARLY_STEPS, EARLY_RATIO = 8, 10.0
"""Before there is anything to compare with: too high is so many times the first losses."""
SHOWN_ROWS, SHOWN_RECORDS = 40, 8
NORMAL_SPREAD = 1.4826
"""Standard deviation of a normal distribution by its median absolute deviation."""


@dataclass
class GuardState:
    """All that the guard remembers: plain values, a part of a checkpoint's counters."""

    skipped: int = 0
    """Steps of the run that were not finite and changed nothing."""
    spikes: int = 0
    rollbacks: int = 0
    stretch: str = ""
    """Stage and mask ratio that the statistics are of; they begin anew with another."""
    steps: int = 0
    """Finite steps of the stretch."""
    early: list[float] = field(default_factory=list)
    """Logarithms of the first losses of the stretch."""
    history: list[float] = field(default_factory=list)
    """Logarithms of the last losses, oldest first."""
    best: list[float] = field(default_factory=list)
    """Lowest level of the stretch so far and the spread there, in logarithms; empty = not known yet."""
    skips: list[int] = field(default_factory=list)
    """Images seen before the skipped steps of the window, those left out that the data are to blame for."""
    data_skips: list[int] = field(default_factory=list)
    bad_records: list[str] = field(default_factory=list)
    """The first records that were found to hold NaN or infinity."""
    trouble: int | None = None
    """Images seen before the first step of what may be becoming a divergence."""
    clean: int = 0
    """Steps since the last bad one of that trouble."""


@dataclass(frozen=True)
class Verdict:
    """What the loop has to do, and what there is to say."""

    action: Literal["go", "roll back", "stop"]
    text: str | None = None
    """A sentence for console and event log."""
    what: str | None = None
    """Kind of the event: ``skipped``, ``loss-spike`` or ``diverged``."""


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def level_and_spread(logs: Sequence[float]) -> tuple[float, float]:
    """Median, and the standard deviation by the median absolute deviation; single outliers do not count.

    Args:
        logs: logarithms of losses, at least one.

    Returns:
        Both, in logarithms; the spread is at least ``NARROWEST``.
    """
    level = _median(logs)
    return level, max(NARROWEST, NORMAL_SPREAD * _median([abs(x - level) for x in logs]))


class Guard:
    """Watches the losses of a run.

    A step whose loss or gradient is not finite changes nothing and is counted; too many within a window are a
    divergence. So is a lasting rise: the median of the last ``window`` / 4 losses is above twice the best
    level of the stretch, and above it by three spreads. A single high loss is a spike, which is only said.

    Losses are compared as logarithms, by medians, so that neither their size nor the noise of small batches
    matters; only with others of the same stage and mask ratio; and not in the first ``warmup`` steps of
    these, in which a network adapts (there only ten times the first losses count).

    Args:
        config: thresholds.
        state: changed in place; that of a checkpoint goes on exactly.
    """

    def __init__(self, config: GuardConfig, state: GuardState) -> None:
        self.config, self.state = config, state
        self._here: Position | None = None
        self._rows: deque[tuple[int, str, float, float]] = deque(maxlen=SHOWN_ROWS)
        self._seen = ""

    # -- what the loop reads -------------------------------------------------------------------------------

    @property
    def lr_scale(self) -> float:
        """Factor of the learning rate: the product of the reductions so far, which last to the run's end."""
        return self.config.lr_cut**self.state.rollbacks

    @property
    def data_shift(self) -> int:
        """Number of roll-backs: a part of the seeds of data order and noise, so that others follow."""
        return self.state.rollbacks

    @property
    def bad_since(self) -> int | None:
        """Images seen after which no checkpoint can be trusted, ``None`` = all is well.

        ``good_after`` steps before the first bad one of the present trouble.
        """
        if self.state.trouble is None or self._here is None:  # a run that is over has no stage any more
            return None
        return max(0, self.state.trouble - self.config.good_after * self._stage.batch)

    def good_checkpoint(self, nimgs: Sequence[int]) -> int | None:
        """Where to go back to.

        Args:
            nimgs: images seen at the checkpoints there are.

        Returns:
            The newest that was followed by ``good_after`` good steps; else the oldest before the trouble;
            ``None`` = there is none, the run has to begin anew.
        """
        since, trouble = self.bad_since, self.state.trouble
        if since is None or trouble is None:
            return max(nimgs, default=None)
        trusted = [nimg for nimg in nimgs if nimg <= since]
        return max(trusted) if trusted else min((n for n in nimgs if n <= trouble), default=None)

    # -- what the loop tells -------------------------------------------------------------------------------

    @property
    def _stage(self) -> StageConfig:
        assert self._here is not None, "the loop tells the stage first"
        return self._here.stage

    def enter(self, here: Position) -> None:
        """Tell where the run is; before a new stage begins, all steps of the old one must be observed.

        Args:
            here: stage and images seen.
        """
        self._here = here

    def observe(
        self,
        nimg: int,
        losses: Sequence[float],
        norms: Sequence[float],
        records: Mapping[int, Sequence[str]] | None = None,
    ) -> Verdict:
        """Look at the steps since the last call; must be called before a checkpoint is saved.

        Args:
            nimg: images of the run seen after the last of these steps.
            losses: means over the batch, the same on all ranks; not finite where a step changed nothing.
            norms: of the gradient before clipping, likewise.
            records: names of those that hold NaN or infinity, by the images seen before their step.

        Returns:
            What to do. At ``roll back`` the loop restores :meth:`good_checkpoint`, then calls
            :meth:`rolled_back`; at ``stop`` it writes :meth:`report` and ends with :meth:`last_words`.
        """
        batch, said = self._stage.batch, Verdict("go")
        for steps_left, loss, norm in zip(range(len(losses) - 1, -1, -1), losses, norms, strict=True):
            before = nimg - (steps_left + 1) * batch
            self._rows.append((before, self._stage.name, loss, norm))
            finite = math.isfinite(loss) and math.isfinite(norm)
            if finite:
                verdict = self._judge(before, loss, norm)
            else:
                verdict = self._skipped(before, loss, norm, (records or {}).get(before, ()))
            if verdict.action != "go":
                return verdict
            if verdict.text is not None:
                more = "" if said.text is None else f"{said.text}; "
                said = Verdict("go", more + verdict.text, verdict.what)
        return said

    def rolled_back(self, before: GuardState | None, where: str) -> str:
        """Go on from an older state; called when the weights of a checkpoint were restored.

        The statistics are as they were then, but what happened since stays known, although it is undone.

        Args:
            before: state in that checkpoint; ``None`` = the run begins anew.
            where: for the sentence, e.g. the checkpoint's folder.

        Returns:
            A sentence for console and event log.
        """
        now = self.state
        self.state = replace(
            before if before is not None else GuardState(),
            rollbacks=now.rollbacks + 1,
            skipped=now.skipped,
            spikes=now.spikes,
            bad_records=now.bad_records,
            skips=[],
            data_skips=[],
            trouble=None,
            clean=0,
        )
        return (
            f"rolled back to {where}: training goes on with another order of the data and {self.lr_scale:g} "
            f"times the learning rate (roll-back {self.data_shift} of at most {self.config.max_rollbacks})"
        )

    # -- judging -------------------------------------------------------------------------------------------

    def _place(self, before: int) -> str:
        return f"image {before:,} (stage {self._stage.name!r})"

    def _skipped(self, before: int, loss: float, norm: float, records: Sequence[str]) -> Verdict:
        state, window = self.state, self.config.window * self._stage.batch
        state.skipped += 1
        mine = state.data_skips if records else state.skips
        mine.append(before)
        mine[:] = [place for place in mine if place > before - window]
        new = [name for name in records if name not in state.bad_records]
        state.bad_records += new[: SHOWN_RECORDS - len(state.bad_records)]
        text = (
            f"the step at {self._place(before)} was skipped, weights and optimiser are as they were: loss "
            f"{loss:g}, gradient norm {norm:g}"
        )
        if records:
            text += f"; {', '.join(records[:SHOWN_RECORDS])}"
        else:
            self._bad(before)
        if len(mine) < self.config.max_skips:
            return Verdict("go", text, "skipped")
        if records:
            self._seen = (
                f"{len(mine)} of the last {self.config.window} steps had NaN or infinity in the data "
                f"({', '.join(state.bad_records)})"
            )
            return Verdict("stop", self._seen, "diverged")
        return self._diverged(
            before,
            f"{len(mine)} of the last {self.config.window} steps gave a loss or gradient that is not finite",
        )

    def _judge(self, before: int, loss: float, norm: float) -> Verdict:
        """A finite loss against those before it."""
        config, state, stage = self.config, self.state, self._stage
        assert self._here is not None
        ratio = stage.mask_ratio_at(before - self._here.start_nimg)
        stretch = f"{self._here.index} at {ratio:g}"
        if stretch != state.stretch:
            state.stretch, state.steps = stretch, 0
            state.early, state.history, state.best = [], [], []
        log = math.log(max(loss, 1e-30))
        few = config.window // 4
        recent = [*state.history[-(few - 1) :], log]
        verdict, high = Verdict("go"), math.inf
        if len(state.early) < EARLY_STEPS:
            state.early.append(log)
        elif not state.best:
            high = _median(state.early) + math.log(EARLY_RATIO)
        if len(state.history) >= 2 * few:
            level, spread = level_and_spread(state.history[:-few])
            if not state.best or level < state.best[0]:
                state.best = [level, spread]
            high = state.best[0] + max(math.log(LASTING), 3 * max(spread, state.best[1]))
            if log > level + config.spike * spread:
                verdict = self._spike(before, loss, norm, math.exp(level))
        if verdict.what is None and state.trouble is not None:
            state.clean += 1
            if state.clean >= config.good_after:
                state.trouble = None
        state.steps += 1
        state.history.append(log)
        # During the warm-up too few are kept to compare with.
        del state.history[: -(config.window + few if state.steps > config.warmup else few)]
        if len(recent) < few or _median(recent) <= high:
            return verdict
        since = next(i for i, x in enumerate(recent) if x > high)
        usual = math.exp(state.best[0] if state.best else _median(state.early))
        return self._diverged(
            before - (few - 1 - since) * stage.batch,
            f"the loss has been {math.exp(_median(recent[since:])):.4g} for {few - since} steps, after "
            f"{usual:.4g}",
        )

    def _spike(self, before: int, loss: float, norm: float, level: float) -> Verdict:
        first = self.state.trouble is None
        self.state.spikes += 1
        self._bad(before)
        text = (
            f"loss spike at {self._place(before)}: {loss:.4g} where {level:.4g} is usual, gradient norm "
            f"{norm:.4g}; training goes on"
        )
        return Verdict("go", text if first else None, "loss-spike")  # one sentence for each trouble

    def _bad(self, before: int) -> None:
        """Remember where a trouble began, and that it is not over."""
        self.state.clean = 0
        if self.state.trouble is None or before < self.state.trouble:
            self.state.trouble = before

    def _diverged(self, before: int, seen: str) -> Verdict:
        self._bad(before)
        self._seen = f"{seen}, at {self._place(self._rows[-1][0])}"
        over = self.state.rollbacks >= self.config.max_rollbacks
        return Verdict("stop" if over else "roll back", f"training diverges: {self._seen}", "diverged")

    # -- the end -------------------------------------------------------------------------------------------

    def last_words(self, good: str | None) -> str:
        """One sentence on why the run stops: what was seen, where, which checkpoint is good, what to try.

        Args:
            good: where :meth:`good_checkpoint` lies; ``None`` = there is none.

        Returns:
            The sentence.
        """
        kept = f"the last good checkpoint is {good}" if good is not None else "there is no good checkpoint"
        if self._data_to_blame:
            return (
                f"training stopped: {self._seen}; {kept}; take these records out of the data or prepare them "
                "anew, then train in another folder (--out)"
            )
        assert self._here is not None
        stage, tried = f"stages.{self._here.stage.name}", self.state.rollbacks
        limits = "a longer warmup_nimg" if self._stage.clip_norm is not None else "clip_norm=1"
        return (
            f"training stopped: {self._seen}"
            + (
                f", in spite of {tried} roll-backs, the last at {self.lr_scale:g} of the rate"
                if tried
                else ""
            )
            + f"; {kept}; start again in another folder (--out) with a lower {stage}.lr or {limits}, see "
            "report-divergence.txt"
        )

    @property
    def _data_to_blame(self) -> bool:
        return len(self.state.data_skips) >= self.config.max_skips

    def report(self, good: str | None) -> str:
        """Content of ``report-divergence.txt``: the last words, the settings that matter and the last steps.

        Args:
            good: as in :meth:`last_words`.

        Returns:
            Lines of text.
        """
        state, stage = self.state, self._stage
        records = ", ".join(state.bad_records) or "none found"
        lines = [
            self.last_words(good),
            "",
            f"stage               {stage.name}",
            f"learning rate       {stage.lr:g} at its peak, times {self.lr_scale:g} after {state.rollbacks} "
            "roll-backs",
            f"batch               {stage.batch}",
            f"clip_norm           {stage.clip_norm}",
            f"steps skipped       {state.skipped} of the run",
            f"loss spikes         {state.spikes} of the run",
            f"records with NaN    {records}",
            "",
            f"{'image':>14}  {'loss':>12}  {'gradient norm':>14}  stage",
        ]
        lines += [f"{at:>14,}  {loss:>12.5g}  {norm:>14.5g}  {name}" for at, name, loss, norm in self._rows]
        return "\n".join(lines) + "\n"
