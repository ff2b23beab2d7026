"""Prepared data, and the order in which training sees it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.config import DataConfig
from shoestring.data.loader import prepare
from shoestring.data.records import CaptionedImages
from shoestring.encoders.image import PixelCodec
from shoestring.encoders.text import build_text_encoder


def tiny(n: int = 10, flip: bool = False, progress=None, batch: int = 4):
    images = torch.randint(
        0, 256, (n, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    captions = tuple(f"picture {i // 2}" for i in range(n))
    encoder = build_text_encoder(DataConfig(text_encoder="hashing", max_tokens=5))
    data = CaptionedImages(images, captions)
    return data, encoder, prepare(data, PixelCodec(), encoder, batch=batch, flip=flip, progress=progress)


def rows_of(prepared, batch) -> list[int]:
    """Which rows a batch holds, told by their pixels."""
    return [
        next(i for i, row in enumerate(prepared.moments_NMhw) if torch.equal(row, moments))
        for moments in batch.moments_BMhw
    ]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_the_order_does_not_depend_on_the_batch_size(n: int, sizes: list[int]) -> None:
    _, _, prepared = tiny(n)
    whole = rows_of(prepared, prepared.batch(0, 0, 36))
    assert all(sorted(whole[e * n : (e + 1) * n]) == list(range(n)) for e in range(36 // n))
    for size in sizes:
        parts = [rows_of(prepared, prepared.batch(0, k * size, size)) for k in range(36 // size)]
        assert [row for part in parts for row in part] == whole[: 36 // size * size]


def test_rows_carry_their_own_picture_and_caption() -> None:
    data, encoder, prepared = tiny()
    assert len(prepared) == 10
    assert prepared.captions == tuple(f"picture {i}" for i in range(5))
    assert prepared.text_USD.shape == (5, 5, 256)
    batch = prepared.batch(0, 8, 8)
    rows = rows_of(prepared, batch)
    text_BSD, mask_BS = encoder([data.captions[row] for row in rows])
    assert torch.equal(batch.moments_BMhw, data.images[rows])
    assert torch.equal(batch.text_BSD, text_BSD.half().float())
    assert torch.equal(batch.text_mask_BS, mask_BS)
    assert batch.class_B.tolist() == [row // 2 for row in rows]


def test_mirroring_is_by_sample_not_by_batch() -> None:
    _, _, prepared = tiny(flip=True)
    _, _, plain = tiny()
    whole = prepared.batch(0, 0, 60).moments_BMhw
    straight = plain.batch(0, 0, 60).moments_BMhw
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(whole, straight, strict=True)])
    same = torch.tensor([torch.equal(a, b) for a, b in zip(whole, straight, strict=True)])
    assert (mirrored ^ same).all()
    assert 15 < mirrored.sum() < 45
    parts = [prepared.batch(0, start, 6).moments_BMhw for start in range(0, 60, 6)]
    assert torch.equal(torch.cat(parts), whole)


def test_progress_reaches_the_total() -> None:
    calls: list[tuple[int, int]] = []
    tiny(flip=True, progress=lambda done, total: calls.append((done, total)), batch=3)
    assert calls[-1] == (25, 25)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_sigma_data_is_the_standard_deviation_of_the_latents() -> None:
    data, _, prepared = tiny()
    expected = (data.images.double() / 127.5 - 1).std(correction=0).item()
    assert prepared.sigma_data() == pytest.approx(expected, rel=1e-6)


def test_the_batch_size_of_encoding_does_not_matter() -> None:
    one, other = tiny(batch=3)[2], tiny(batch=64)[2]
    assert torch.equal(one.moments_NMhw, other.moments_NMhw)
    assert torch.equal(one.text_USD, other.text_USD)
