"""Retrieval: shares, ties, chance, near-copies, and the same measure from a folder of PNGs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from shoestring.evaluation.retrieval import near_copy_mask, retrieval, retrieval_of_folder
from shoestring.runtime import UserError


class PooledPixels:
    """A weight-free extractor: mean colours of a 4 x 4 grid of cells."""

    name = "pooled-pixels"
    width = 48

    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels.float() + 1, 4).flatten(1)


def random_pictures(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return cells.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def test_ranks_by_hand() -> None:
    training = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0], [-1.0, -1.0], [0.1, -1.0]])
    samples = torch.tensor([[5.0, 0.1], [5.0, 0.1], [5.0, 0.1]])
    # The nearest to all three is picture 0; picture 1 comes second and picture 3 last.
    result = retrieval(samples, [0, 1, 3], training, [0, 1, 2, 3, 4, 5], near_copies=2)
    assert result.top1 == pytest.approx(1 / 3)
    assert result.top5 == pytest.approx(2 / 3)
    assert result.chance_top1 == pytest.approx(1 / 6)
    assert result.chance_top5 == pytest.approx(5 / 6)
    assert (result.n, result.captions, result.near_copies) == (3, 3, 2)


def test_the_measure_does_not_depend_on_the_length_of_features() -> None:
    generator = torch.Generator().manual_seed(0)
    training = torch.randn(20, 8, generator=generator)
    samples = training + 1.5 * torch.randn(20, 8, generator=generator)
    args = (list(range(20)), training, list(range(20)))
    plain = retrieval(samples, *args, near_copies=0)
    assert 0.05 < plain.top1 < plain.top5 < 1
    lengths = torch.rand(20, 1, generator=generator) + 0.1
    assert retrieval(samples * lengths, *args, near_copies=0) == plain
    assert retrieval(samples, args[0], training * lengths, args[2], near_copies=0) == plain


def test_a_tie_never_helps() -> None:
    same = torch.ones(3, 4)
    result = retrieval(torch.ones(1, 4), [1], same, [0, 1, 2], near_copies=0)
    assert result.top1 == 0
    assert result.top5 == 1
    # Ties with pictures of the own caption cost nothing.
    assert retrieval(torch.ones(1, 4), [1], same, [1, 1, 1], near_copies=0).top1 == 1


@pytest.mark.parametrize("own", [1, 2, 6])
def test_chance_counts_all_rankings(own: int) -> None:
    total = 9
    sets = list(itertools.combinations(range(total), 5))
    expected = sum(min(s) < own for s in sets) / len(sets)
    captions = [0] * own + list(range(1, total - own + 1))
    training = torch.randn(total, 4, generator=torch.Generator().manual_seed(0))
    result = retrieval(training[:1], [0], training, captions, near_copies=0)
    assert result.chance_top5 == pytest.approx(expected)
    assert result.chance_top1 == pytest.approx(own / total)


def test_interval_counts_captions_not_samples() -> None:
    training = torch.eye(10)
    samples = torch.cat([torch.eye(10)[[0, 1, 2, 3, 4, 0, 0, 0, 0, 0]]] * 2)
    captions = list(range(10)) * 2
    once = retrieval(samples[:10], captions[:10], training, range(10), near_copies=0)
    twice = retrieval(samples, captions, training, range(10), near_copies=0)
    assert twice.n == 20
    assert twice.top1 == once.top1 == 0.5
    assert twice.top1_interval95 == once.top1_interval95 == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert twice.metrics()["retrieval_top1_low95"] == twice.top1_interval95[0]


def test_near_copies() -> None:
    training = random_pictures(5, 0)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(training.shape, generator=generator)

    def noisy(levels: float) -> Tensor:
        inside = training.float() * 0.5 + 64  # away from the ends, where clipping would reduce the noise
        return (inside + levels * noise).round().to(torch.uint8)

    base = noisy(0)
    assert near_copy_mask(base, base).all()
    assert near_copy_mask(noisy(10), base).all()  # 10 / 255 = 3.9 %
    assert not near_copy_mask(noisy(16), base).any()  # 6.3 %
    assert not near_copy_mask(random_pictures(300, 2), training).any()
    mixed = torch.cat([random_pictures(300, 2), training[3:4]])
    assert near_copy_mask(mixed, training).nonzero().flatten().tolist() == [300]
    with pytest.raises(ValueError, match="judged at one size"):
        near_copy_mask(training[:, :, :8], training)


def save(path: Path, picture: Tensor, caption: str | None, seed: int = 0) -> None:
    info = PngInfo()
    if caption is not None:
        info.add_text("shoestring", json.dumps({"prompt": caption, "seed": seed}, ensure_ascii=False))
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, pnginfo=info)


def test_folder_gives_the_measure_of_the_arrays(tmp_path: Path) -> None:
    training = random_pictures(8, 0)
    names = [f"café {i} <b>" for i in range(8)]
    generator = torch.Generator().manual_seed(5)
    noise = 60 * torch.randn(training.shape, generator=generator)
    noise[4:] *= 0.01
    samples = (training.float() + noise).clamp(0, 255).to(torch.uint8)
    for i in range(8):
        save(tmp_path / f"{i}.png", samples[i], names[i])
    save(tmp_path / "new.png", samples[0], "never seen")
    save(tmp_path / "grid.png", torch.zeros(3, 40, 40, dtype=torch.uint8), None)
    extractor = PooledPixels()
    found = retrieval_of_folder(tmp_path, training, names, extractor)
    expected = retrieval(
        extractor(samples), list(range(8)), extractor(training), list(range(8)), near_copies=4
    )
    assert found.left_out == {"caption never trained on": 1, "no caption in the metadata": 1}
    assert {**found.metrics(), "retrieval_left_out": 0} == expected.metrics()


def test_bad_folders_are_named(tmp_path: Path) -> None:
    training, names = random_pictures(2, 0), ["a", "b"]

    def measure(folder: Path) -> None:
        retrieval_of_folder(folder, training, names, PooledPixels())

    with pytest.raises(UserError, match="is not a folder"):
        measure(tmp_path / "absent")
    with pytest.raises(UserError, match="no PNG at all"):
        measure(tmp_path)
    save(tmp_path / "x.png", training[0], "other")
    with pytest.raises(UserError, match="1 with caption never trained on"):
        measure(tmp_path)
    save(tmp_path / "y.png", training[0, :, :8, :8], "a")
    with pytest.raises(UserError, match=r"y\.png is 8 x 8 and the training pictures are 16 x 16"):
        measure(tmp_path)
    save(tmp_path / "y.png", training[0], "a")
    whole = (tmp_path / "y.png").read_bytes()
    for broken in (b"not a picture", whole[: len(whole) - 30]):
        (tmp_path / "y.png").write_bytes(broken)
        with pytest.raises(UserError, match=r"y\.png cannot be read as a PNG"):
            measure(tmp_path)


def test_bad_arrays_are_named() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"captions \[7\] of the samples have no training picture"):
        retrieval(x, [0, 1, 7], x, [0, 1, 2], near_copies=0)
    with pytest.raises(ValueError, match="2 and 3 captions for 3 samples and 3 training pictures"):
        retrieval(x, [0, 1], x, [0, 1, 2], near_copies=0)
    with pytest.raises(ValueError, match="row of zeros"):
        retrieval(x * 0, [0, 1, 2], x, [0, 1, 2], near_copies=0)
    with pytest.raises(ValueError, match="samples have 0 rows"):
        retrieval(x[:0], [], x, [0, 1, 2], near_copies=0)
    with pytest.raises(ValueError, match="4 and 2 columns"):
        retrieval(x, [0, 1, 2], x[:, :2], [0, 1, 2], near_copies=0)
