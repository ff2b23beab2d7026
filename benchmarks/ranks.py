"""Two gloo ranks of one core each against one process of two cores, at the same global batch.

    python benchmarks/ranks.py [--model tiny2] [--batch 128] [--mask 0.75] [--rounds 3] [--sharding ddp]

The sides work in turns, so that both are measured on the same machine in the same minutes; each turn starts
its processes anew, as ``tiny2`` with moments and averages takes 4 GB in each before the first activation.
Gradients are float32 and travel once a step. The bar is 85 % of the rate.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence

BAR = 0.85


def work(options: argparse.Namespace) -> None:
    """A process of either side: a round of steps for each line that is read."""
    import torch

    from checkpoint_stall import build_learner, step_s
    from shoestring.config import ParallelConfig
    from shoestring.runtime import keep_freed_memory
    from shoestring.training.parallel import Parallel
    from train_step import MODELS, make_batch

    keep_freed_memory()
    parallel = Parallel(ParallelConfig(sharding=options.sharding if "RANK" in os.environ else "auto"), "cpu")
    workers = 1 if parallel.ranks > 1 else options.ranks
    share = options.batch // parallel.ranks
    model = MODELS[options.model]()
    learner = build_learner(model, workers, parallel)
    batch = make_batch(model, share, torch.Generator().manual_seed(1 + parallel.rank))
    micro = min(share, options.micro * workers)

    def step() -> float:
        return step_s(learner, batch, options.batch, micro, options.mask)

    step()
    parallel.total([0.0])  # all ranks are there
    print(statistics.median(step() for _ in range(options.steps)))
    parallel.close()


def turn_s(words: Sequence[str], ranks: int, threads: int) -> float:
    """Seconds of a step of one side, all its processes together.

    Args:
        words: options of this program.
        ranks: processes that share a batch.
        threads: of each of them.

    Returns:
        The slowest one's median.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, *words, "--work"]
        processes.append(subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE))
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a process failed; its words are above")
    return max(float(each.splitlines()[-1]) for each in said)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description="Rate of several ranks against one process.")
    parser.add_argument("--model", default="tiny2", help="see train_step.py")
    parser.add_argument("--batch", type=int, default=128, help="of all ranks together")
    parser.add_argument("--micro", type=int, default=32, help="images at once on a core")
    parser.add_argument("--mask", type=float, default=0.75)
    parser.add_argument("--ranks", type=int, default=2, help="and cores of the one process")
    parser.add_argument("--sharding", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.work:
        work(options)
        return
    times = []
    for _ in range(options.rounds):
        times.append((turn_s(words, 1, options.ranks), turn_s(words, options.ranks, 1)))
        print(f"one process {times[-1][0]:.3f} s, {options.ranks} ranks {times[-1][1]:.3f} s", flush=True)
    alone, together = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    print(
        f"\n{options.model}, global batch {options.batch}, mask {options.mask}, {options.sharding}\n"
        f"one process of {options.ranks} cores  {options.batch / alone:8.2f} images/s\n"
        f"{options.ranks} ranks of one core     {options.batch / together:8.2f} images/s  "
        f"{ratio:.1%} of the rate, bar {BAR:.0%}: {'met' if ratio >= BAR else 'missed'}"
    )


if __name__ == "__main__":
    main()
