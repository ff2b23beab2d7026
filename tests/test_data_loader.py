"""Prepared data, and the order in which training sees it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.config.schema import DataConfig
from shoestring.data.loader import prepare, sample_index
from shoestring.data.records import CaptionedImages
from shoestring.encoders.image import PixelCodec
from shoestring.encoders.text import build_text_encoder

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**32)


def tiny(n: int = 10, flip: bool = False, progress=None, batch: int = 4):
    images = torch.randint(
        0, 256, (n, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    captions = tuple(f"picture {i // 2}" for i in range(n))
    encoder = build_text_encoder(DataConfig(text_encoder="hashing", max_tokens=5))
    data = CaptionedImages(images, captions)
    return data, encoder, prepare(data, PixelCodec(), encoder, batch=batch, flip=flip, progress=progress)


@given(SEEDS, SIZES, st.integers(0, 5))
def test_every_epoch_is_a_permutation(seed: int, n: int, epoch: int) -> None:
    rows = [sample_index(seed, epoch * n + place, n) for place in range(n)]
    assert sorted(rows) == list(range(n))


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(sample_index(seed, epoch * 30 + place, 30) for place in range(30))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


@settings(deadline=None)
@given(SEEDS, SIZES, st.lists(st.integers(1, 17), min_size=1, max_size=8), st.integers(0, 100))
def test_the_order_does_not_depend_on_the_batch_size(
    seed: int, n: int, counts: list[int], first: int
) -> None:
    _, _, prepared = tiny(n)
    rows, nimg = [], first
    for count in counts:
        rows += prepared.batch(seed, nimg, count).index_B.tolist()
        nimg += count
    assert rows == prepared.batch(seed, first, nimg - first).index_B.tolist()


def test_rows_carry_their_own_picture_and_caption() -> None:
    data, encoder, prepared = tiny()
    assert len(prepared) == 10
    assert prepared.captions == tuple(f"picture {i}" for i in range(5))
    assert prepared.text_USD.shape == (5, 5, 256)
    batch = prepared.batch(3, 7, 8)
    assert batch.moments_BMhw.dtype == batch.text_BSD.dtype == torch.float32
    text_BSD, mask_BS = encoder([data.captions[row] for row in batch.index_B])
    assert torch.equal(batch.moments_BMhw, PixelCodec().encode(data.images[batch.index_B]))
    assert torch.equal(batch.text_BSD, text_BSD.half().float())
    assert torch.equal(batch.text_mask_BS, mask_BS)


def test_mirroring_is_by_sample_not_by_batch() -> None:
    data, _, prepared = tiny(flip=True)
    whole = prepared.batch(1, 5, 60)
    plain = PixelCodec().encode(data.images)[whole.index_B]
    mirrored = torch.tensor(
        [torch.equal(a, b.flip(-1)) for a, b in zip(whole.moments_BMhw, plain, strict=True)]
    )
    same = torch.tensor([torch.equal(a, b) for a, b in zip(whole.moments_BMhw, plain, strict=True)])
    assert (mirrored ^ same).all()
    assert 15 < mirrored.sum() < 45
    parts = [prepared.batch(1, 5 + start, 7).moments_BMhw for start in range(0, 56, 7)]
    assert torch.equal(torch.cat(parts), whole.moments_BMhw[:56])


def test_progress_reaches_the_total() -> None:
    calls: list[tuple[int, int]] = []
    tiny(flip=True, progress=lambda done, total: calls.append((done, total)), batch=3)
    assert calls[-1] == (25, 25)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_sigma_data_is_the_standard_deviation_of_the_latents() -> None:
    data, _, prepared = tiny()
    expected = PixelCodec().encode(data.images).double().std(correction=0).item()
    assert prepared.sigma_data() == pytest.approx(expected, rel=1e-6)


def test_the_batch_size_of_encoding_does_not_matter() -> None:
    one, other = tiny(batch=3)[2], tiny(batch=64)[2]
    assert torch.equal(one.moments_NMhw, other.moments_NMhw)
    assert torch.equal(one.text_USD, other.text_USD)
