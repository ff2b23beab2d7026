"""Precompute on many machines: the same units, computed by actors of Ray Data.

An actor writes the piece of a unit and gives its line of the journal; the driver notes the lines as they
come and commits once at the end. An actor that dies is started again, and its unit is computed again: what
it left is in no table and is removed at the end. (Ray's own writer for Lance does not work with the versions
that shoestring is tested with.)
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from shoestring.data.precompute import Job, describe
from shoestring.data.runner import Runner
from shoestring.data.units import Makers, Plan, Tools, Unit
from shoestring.runtime import UserError


class RayEngine:
    """Actors of Ray Data; every one of them builds its own codec and encoders."""

    def __init__(
        self,
        workers: int = 2,
        address: str | None = None,
        cpus: float = 0.5,
        gpus: float = 0.0,
        threads: int = 2,
    ) -> None:
        """Connect to a cluster, or start Ray on this machine.

        Args:
            workers: actors.
            address: of a cluster, e.g. ``auto``; by default this machine, or what is connected already.
            cpus: that an actor takes. Ray waits forever where actors take all processors of a small
                machine, as none is left to read their input; hence a half.
            gpus: that an actor takes.
            threads: that decode pictures in an actor.

        Raises:
            UserError: if Ray is not installed or the cluster does not answer.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise UserError(
                "--engine ray needs the package ray; run: pip install 'shoestring[ray]'"
            ) from error
        if workers < 1:
            raise UserError(f"--workers is {workers}; it must be at least 1")
        self.workers, self.cpus, self.gpus, self.threads = workers, cpus, gpus, threads
        if not ray.is_initialized():
            try:
                with warnings.catch_warnings():
                    # Ray's servers are programs of their own, in which this process's Lance is not used.
                    warnings.filterwarnings("ignore", message="lance is not fork-safe")
                    ray.init(
                        address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
                    )
            except (ConnectionError, ValueError) as error:
                raise UserError(f"no Ray cluster answers at {address!r} ({_first_line(error)})") from error
        have = ray.cluster_resources()
        for kind, each in (("CPU", cpus), ("GPU", gpus)):
            if each * workers > have.get(kind, 0):
                raise UserError(
                    f"--workers is {workers} and each takes {each:g} {kind}, but Ray has "
                    f"{have.get(kind, 0):g}; take fewer workers, or less for each"
                )

    def describe(self, job: Job, makers: Makers) -> dict[str, Any]:
        """Ask a worker: the driver's machine may have no accelerator."""
        import ray

        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus)(_describe)
        facts = json.loads(ray.get(task.remote(job, makers)))
        if "mistake" in facts:
            raise UserError(facts["mistake"])
        return dict(facts)

    def run(
        self, plan: Plan, makers: Makers, units: Sequence[Unit], tick: Callable[[str, int], None]
    ) -> Iterator[dict[str, Any]]:
        """Entries as they are done, in any order."""
        if not units:
            return
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        DataContext.get_current().enable_progress_bars = False
        items = [{"unit": json.dumps(asdict(unit))} for unit in units]
        workers = min(self.workers, len(units))
        # A block for each unit, so that a line comes as soon as its unit is done.
        done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Worker,
            fn_constructor_args=(plan, makers, self.threads),
            batch_size=1,
            compute=ActorPoolStrategy(size=workers),
            num_cpus=self.cpus,
            num_gpus=self.gpus,
        )
        for row in done.iter_rows():
            answer = json.loads(row["answer"])
            if "mistake" in answer:
                raise UserError(answer["mistake"])
            unit = Unit(**answer["unit"])
            times = max(1, len(plan.pictures)) if unit.kind == "records" else 1
            tick(unit.kind, unit.rows * times)
            yield answer


def _describe(job: Job, makers: Makers) -> str:
    try:
        return json.dumps(describe(job, Tools(makers)))
    except UserError as mistake:
        return json.dumps({"mistake": str(mistake)})


class _Worker:
    """An actor. Mistakes of the user come back as answers: Ray would wrap them in pages of traces."""

    def __init__(self, plan: Plan, makers: Makers, threads: int) -> None:
        self._given = plan, makers, threads
        self._runner: Runner | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """One unit after another; stores are opened at the first."""
        try:
            if self._runner is None:
                plan, makers, threads = self._given
                self._runner = Runner(plan, Tools(makers), threads)
            units = [Unit(**json.loads(unit)) for unit in batch["unit"]]
            return {"answer": [json.dumps(entry) for entry in self._runner.run(units)]}
        except UserError as mistake:
            return {"answer": [json.dumps({"mistake": str(mistake)})]}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
