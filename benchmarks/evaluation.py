"""What an evaluation costs once the features are there: 10,000 samples against 10,000 real pictures.

    python benchmarks/evaluation.py [--count 10000] [--width 2048]

Fréchet and kernel distance, precision and recall, density and coverage, in one process; seconds of each, and
the largest resident memory of the process, its imports and the features themselves included. The Fréchet
distance is timed beside the usual formula with SciPy's iterated matrix root on the same features, and a case
is shown in which that goes wrong: fewer samples than features.
"""

from __future__ import annotations

import os

# Before torch is imported: busy waiting collapses when anything else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.linalg import sqrtm

from shoestring.evaluation.distances import frechet_distance, kernel_distance
from shoestring.evaluation.manifold import overlap
from shoestring.runtime import stream

SHIFT = 0.1
"""Between the two sets, in standard deviations of every feature."""


def features(count: int, width: int, seed: int, shift: float) -> torch.Tensor:
    """Correlated features of a spectrum that falls, as those of pictures do."""
    generator = stream(seed, "features")
    scale_F = torch.arange(1, width + 1, dtype=torch.float32) ** -0.5
    mixed_FF = torch.linalg.qr(torch.randn(width, width, generator=stream(0, "mix"))).Q
    return torch.randn(count, width, generator=generator) * scale_F @ mixed_FF + shift / width**0.5


def by_matrix_root(a_NF: torch.Tensor, b_NF: torch.Tensor) -> float:
    """The formula as it is usually written; the imaginary part of the root is dropped, as everywhere."""
    a, b = a_NF.double().numpy(), b_NF.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap = a.mean(axis=0) - b.mean(axis=0)
    root = np.real(sqrtm(cov_a @ cov_b))
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root))


def timed(what: str, compute: Callable[[], object]) -> float:
    """Run once and print the seconds."""
    began = time.perf_counter()
    found = compute()
    seconds = time.perf_counter() - began
    print(f"{what:42}{seconds:8.1f} s   {found}", flush=True)
    return seconds


def peak_gb() -> float:
    """Largest resident memory of this process so far, in 10^9 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description="Time of the distances of an evaluation.")
    parser.add_argument("--count", type=int, default=10_000, help="samples, and real pictures")
    parser.add_argument("--width", type=int, default=2048, help="features")
    options = parser.parse_args(arguments)
    made, real = (features(options.count, options.width, seed, seed * SHIFT) for seed in (0, 1))
    seconds = timed("Fréchet distance", lambda: f"{frechet_distance(made, real):.6f}")
    seconds += timed("kernel distance", lambda: kernel_distance(made, real))
    seconds += timed("precision, recall, density, coverage", lambda: overlap(real, made))
    print(f"{'together':42}{seconds:8.1f} s   peak memory {peak_gb():.2f} GB", flush=True)
    timed("Fréchet distance by SciPy's matrix root", lambda: f"{by_matrix_root(made, real):.6f}")
    few = options.width // 4
    print(f"\n{few} samples of {options.width} features against themselves, where the distance is 0:")
    timed("ours", lambda: f"{frechet_distance(made[:few], made[:few]):.3g}")
    timed("by SciPy's matrix root", lambda: f"{by_matrix_root(made[:few], made[:few]):.3g}")


if __name__ == "__main__":
    main()
