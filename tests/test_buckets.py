"""Shapes of equal area, and which picture gets which."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoestring.data.buckets import bucket_shapes, choose_buckets, filled_buckets
from shoestring.runtime import UserError


@pytest.mark.parametrize("multiple", [16, 32])
def test_27_shapes_at_512_px(multiple: int) -> None:
    shapes = bucket_shapes(512, 27, multiple)
    assert len(set(shapes)) == 27
    assert shapes[13] == (512, 512)
    assert {(width, height) for height, width in shapes} == set(shapes)
    aspects = [width / height for height, width in shapes]
    assert aspects == sorted(aspects, reverse=True)
    assert 3.5 <= aspects[0] <= 4
    for height, width in shapes:
        assert height % multiple == 0
        assert width % multiple == 0
        assert abs(height * width / 512**2 - 1) <= 0.15
    steps = np.diff(np.log(aspects))
    assert steps.min() >= -0.25  # no aspect between 1:4 and 4:1 is far from a shape


@given(st.integers(4, 40), st.integers(0, 6), st.sampled_from([8, 16, 64]))
def test_shapes_are_symmetric_or_refused(side: int, pairs: int, multiple: int) -> None:
    try:
        shapes = bucket_shapes(side * multiple, 2 * pairs + 1, multiple)
    except UserError:
        assert 2 * side < 2 * pairs + 9, "there is room for so many"
        return
    assert len(set(shapes)) == 2 * pairs + 1
    assert [(w, h) for h, w in reversed(shapes)] == list(shapes)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((500, 27, 16), "--resolution is 500; it must be a multiple of 16"),
        ((512, 4, 16), "--buckets is 4; it must be odd"),
        ((64, 27, 16), "--buckets is 27; at 64 px in steps of 16 there are at most"),
        ((512, 5, 16, 0.5), "largest aspect of buckets is 0.5"),
    ],
)
def test_impossible_buckets_are_said(values: tuple[int, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        bucket_shapes(*values)


def test_a_picture_gets_the_nearest_aspect() -> None:
    shapes = ((16, 64), (32, 32), (64, 16))
    width_N, height_N = np.array([400, 100, 130, 10, 1000]), np.array([100, 100, 100, 100, 10])
    assert choose_buckets(width_N, height_N, shapes).tolist() == [0, 1, 1, 2, 0]


def test_rare_buckets_give_their_pictures_to_the_next() -> None:
    shapes = ((16, 64), (24, 40), (32, 32), (64, 16))
    width_N, height_N = np.array([400, 160, 100, 100]), np.array([100, 100, 100, 400])
    count_N = np.array([3, 2, 50, 7])
    assert filled_buckets(width_N, height_N, count_N, shapes, 1) == (shapes, (3, 2, 50, 7))
    # The 2 leave first and go to the square or the widest; none of those is then too small.
    kept, counts = filled_buckets(width_N, height_N, count_N, shapes, 3)
    assert kept == ((16, 64), (32, 32), (64, 16))
    assert counts == (3, 52, 7)
    assert filled_buckets(width_N, height_N, count_N, shapes, 62) == (((32, 32),), (62,))
    with pytest.raises(UserError, match="--min-bucket is 63, but the store has 62 pictures in all"):
        filled_buckets(width_N, height_N, count_N, shapes, 63)
    # An empty bucket is left out even if nothing is asked for.
    assert filled_buckets(width_N[2:3], height_N[2:3], count_N[2:3], shapes, 1) == (((32, 32),), (50,))
