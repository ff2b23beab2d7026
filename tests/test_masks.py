"""Which patches are dropped, and how many at which moment of a stage."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoestring.config import (
    StageConfig,
)
from shoestring.runtime import stream
from shoestring.tensors import complement, visible_from_noise

# -- which patches -----------------------------------------------------------------------------------------

masks = st.tuples(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(2, 4),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 2**31),
)


def squares(rows: int, columns: int, block: int) -> list[list[int]]:
    """The patches of every square, written out."""
    found: dict[tuple[int, int], list[int]] = {}
    for row, column in product(range(rows), range(columns)):
        found.setdefault((row // block, column // block), []).append(row * columns + column)
    return list(found.values())


@given(masks, st.sampled_from(["random", "blocks", "stratified"]))
def test_masks_keep_the_right_patches(mask, pattern):
    rows, columns, block, ratio, seed = mask
    length = rows * columns
    noise = torch.rand(2, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    visible = visible_from_noise(noise, ratio, pattern, (rows, columns), block)
    count = max(1, int(length * (1 - ratio)))
    if visible is None:
        assert count == length
        return
    assert visible.shape == (2, count)
    for chosen in visible.tolist():
        assert len(set(chosen)) == count
        assert set(chosen) <= set(range(length))
        shares = [(len(set(square) & set(chosen)), len(square)) for square in squares(rows, columns, block)]
        if pattern == "blocks":  # whole squares, at most one of them in part
            assert sum(0 < stays < size for stays, size in shares) <= 1
        if pattern == "stratified":  # as many of each, give or take one; of small border squares at most all
            least = min((stays for stays, size in shares if stays < size), default=0)
            assert all(stays in (least, least + 1) or stays == size <= least for stays, size in shares)
    assert torch.equal(
        torch.cat([visible, complement(visible, length)], dim=1).sort(dim=1).values,
        torch.arange(length).expand(2, -1),
    )


@pytest.mark.parametrize("pattern", ["random", "blocks", "stratified"])
def test_every_patch_is_kept_equally_often(pattern):
    noise = torch.rand(4000, 16, generator=stream(0, "mask"))
    visible = visible_from_noise(noise, 0.75, pattern, (4, 4), 2)
    share = torch.zeros(4000, 16).scatter(1, visible, 1.0).mean(dim=0)
    deviation = (0.25 * 0.75 / 4000) ** 0.5
    assert (share - 0.25).abs().max() < 5 * deviation


def test_random_masks_are_the_released_ones():
    """The first of the noise's argsort (released MicroDiT and MaskDiT)."""
    noise = torch.rand(3, 16)
    assert torch.equal(visible_from_noise(noise, 0.75), noise.argsort(dim=1)[:, :4])


# -- how many patches --------------------------------------------------------------------------------------


def stage(**changes) -> StageConfig:
    return StageConfig(**{"name": "s", "nimg": 1010, "batch": 10, "lr": 1.0} | changes)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(0.75, 0.0), (0.5, 0.25), (0.0, 0.5), (0.875, 0.875)])
def test_ratio_schedules_go_from_end_to_end_in_sixteenths(schedule, start, end):
    moving = stage(mask_ratio=start, mask_ratio_end=end, mask_schedule=schedule)
    ratios = [moving.mask_ratio_at(done) for done in range(0, 1010, 10)]
    assert (ratios[0], ratios[-1]) == (start, end)
    assert ratios == sorted(ratios, reverse=start > end)
    assert all((16 * ratio).is_integer() for ratio in ratios)
    assert len(set(ratios)) <= 16 * abs(start - end) + 1


@given(
    start=st.floats(0, 1, exclude_max=True),
    end=st.floats(0, 1, exclude_max=True),
    power=st.floats(0.25, 8),
    done=st.integers(0, 1100),
    schedule=st.sampled_from(["linear", "cosine"]),
)
def test_ratios_follow_the_formula_to_half_a_sixteenth(start, end, power, done, schedule):
    moving = stage(mask_ratio=start, mask_ratio_end=end, mask_schedule=schedule, mask_power=power)
    progress = min(1, done / 1000)
    left = math.cos(math.pi / 2 * progress) ** power if schedule == "cosine" else 1 - progress
    exact = end + (start - end) * left
    assert moving.mask_ratio_at(done) == pytest.approx(exact, abs=1 / 32 + 1e-9)
    assert min(start, end) <= moving.mask_ratio_at(done) <= max(start, end)


def test_cosine_of_maskdit_halfway():
    """0.75 cos(pi/4)^4 = 3/16; a constant ratio and a stage of one step are left as they are."""
    assert stage(mask_ratio=0.75, mask_ratio_end=0, mask_schedule="cosine").mask_ratio_at(500) == 3 / 16
    assert stage(mask_ratio=0.3).mask_ratio_at(500) == 0.3
    assert stage(nimg=10, mask_ratio=0.75, mask_ratio_end=0).mask_ratio_at(0) == 0.75
