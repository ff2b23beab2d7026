"""The machine's matmul peak, measured."""

from __future__ import annotations

import time

import torch


def measured_peak_flops(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = (2048, 4096), repeats: int = 5
) -> float:
    """Best rate of square matrix products on this machine right now.

    Args:
        device: where.
        dtype: of the factors.
        sizes: sides of the matrices.
        repeats: products of each size; the fastest counts.

    Returns:
        FLOP/s.
    """
    best = 0.0
    for n in sizes:
        a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
        a @ b
        for _ in range(repeats):
            _synchronize(device)
            start_s = time.perf_counter()
            a @ b
            _synchronize(device)
            best = max(best, 2.0 * n**3 / (time.perf_counter() - start_s))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
