"""GPUs, by their vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from shoestring.runtime import UserError

USABLE = 0.9
"""Share of a GPU's memory that a plan fills: the rest is the driver's, the network's and the allocator's."""


@dataclass(frozen=True)
class GPU:
    """One kind of GPU."""

    title: str
    peak_flops: float
    """FLOP/s of bf16 matrix products with float32 accumulation, without sparsity."""
    memory_bytes: float
    """Gigabytes of the data sheet as 1e9 bytes."""


GPUS: dict[str, GPU] = {
    "a100": GPU("A100 SXM 80 GB", 312e12, 80e9),
    "h100": GPU("H100 SXM", 989e12, 80e9),
    "h200": GPU("H200 SXM", 989e12, 141e9),
    "b200": GPU("B200 SXM", 2250e12, 180e9),
    "mi300x": GPU("MI300X", 1307e12, 192e9),
    "l40s": GPU("L40S", 362e12, 48e9),
    "4090": GPU("RTX 4090", 165e12, 24e9),
    "5090": GPU("RTX 5090", 209.5e12, 32e9),
}
"""By the vendors' data sheets (published): NVIDIA A100, H100, H200, DGX B200 and L40S (where only the figure
with sparsity is given, half of it), whitepapers of GeForce RTX 4090 and 5090, AMD MI300X. Prices are not in
here: they change, and are the user's to give.
"""


def gpu(name: str) -> GPU:
    """A GPU by its short name.

    Args:
        name: such as ``h100``; capitals do not matter.

    Returns:
        Its figures.

    Raises:
        UserError: naming those that are known.
    """
    if name.lower() not in GPUS:
        raise UserError(f"--gpu is {name!r}; choose from {', '.join(GPUS)}")
    return GPUS[name.lower()]
