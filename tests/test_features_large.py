"""Inception, DINOv2 and CLIP: structure, conventions, and what is said of wrong weights. No download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from shoestring.evaluation.features import (
    HUB,
    INCEPTION_FILE,
    HubFeatures,
    InceptionFeatures,
    build_extractor,
)
from shoestring.evaluation.inception import CLASSES, Inception
from shoestring.evaluation.resize import RESIZES, pillow_bicubic, tensorflow_bilinear, torch_bicubic
from shoestring.runtime import UserError


def pictures(count: int, height: int = 20, width: int = 20, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


# -- resizing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "side"), [(4, 7), (7, 4), (5, 5), (1, 3)])
def test_tensorflow_bilinear_is_the_formula(size: int, side: int) -> None:
    row = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    picture = row.expand(1, 3, size, size)
    found = tensorflow_bilinear(picture, side)
    for i in range(side):
        place = i * size / side
        low = int(place)
        high = min(low + 1, size - 1)
        expected = row[low].item() + (row[high].item() - row[low].item()) * (place - low)
        torch.testing.assert_close(found[0, 0, :, i], torch.full((side,), expected), atol=1e-3, rtol=0)
    assert torch.equal(found.mT, tensorflow_bilinear(picture.mT.contiguous(), side))


def test_tensorflow_bilinear_reads_the_first_pixel_and_skips_details() -> None:
    stripes = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    stripes[..., ::2] = 200
    assert tensorflow_bilinear(stripes, 4).unique().tolist() == [200.0]
    assert torch_bicubic(stripes, 4)[..., 1:-1].mean() == pytest.approx(100, abs=10)


def test_pillow_bicubic_is_pillows_without_rounding() -> None:
    pixels = pictures(2, 21, 30)
    found = pillow_bicubic(pixels, 12)
    assert found.shape == (2, 3, 12, 12)
    for picture, ours in zip(pixels, found, strict=True):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        rounded = np.asarray(image.resize((12, 12), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert (ours.clamp(0, 255) - torch.from_numpy(rounded.copy())).abs().max() <= 1.0
    assert not torch.equal(found, found.round())


@pytest.mark.parametrize("name", RESIZES)
def test_pictures_of_the_right_size_stay_as_they_are(name: str) -> None:
    pixels = pictures(2)
    assert torch.equal(RESIZES[name](pixels, 20), pixels.float())


# -- Inception ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the public one, with drawn weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / INCEPTION_FILE
    torch.save(Inception().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights: Path) -> InceptionFeatures:
    extractor = InceptionFeatures(str(weights))
    extractor.chunk = 2
    return extractor


def test_inception_has_the_published_size() -> None:
    with torch.device("meta"):
        network = Inception()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == 21_785_568 + 2048 * CLASSES + CLASSES  # Inception v3 without auxiliary head
    names = network.state_dict().keys()
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_6d.branch7x7dbl_5.bn.running_var", "fc.bias"} <= names
    assert len(names) == 94 * 6 + 2


def test_inception_gives_all_that_the_metrics_read(inception: InceptionFeatures) -> None:
    pixels = pictures(3, 40, 30)
    pooled, spatial, logits = inception.outputs(pixels)
    assert (pooled.shape, spatial.shape, logits.shape) == ((3, 2048), (3, 17 * 17 * 7), (3, CLASSES))
    assert torch.equal(inception(pixels), pooled)
    network = inception._network
    assert isinstance(network, Inception)
    torch.testing.assert_close(logits, pooled @ network.fc.weight.T, atol=1e-4, rtol=1e-4)  # no bias
    assert (spatial >= 0).all()
    alone = inception.outputs(pixels[2:])
    for together, single in zip((pooled, spatial, logits), alone, strict=True):
        assert torch.equal(together[2:], single)


def test_inception_sees_values_around_zero(inception: InceptionFeatures) -> None:
    grey = torch.tensor([0, 128, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 4, 4)
    assert inception.preprocess(grey).amax(dim=(1, 2, 3)).tolist() == [-1.0, 0.0, 127 / 128]


def test_poolings_leave_the_padding_out(inception: InceptionFeatures) -> None:
    """Constant maps stay constant, where averages over padding would fall at the edges."""
    from shoestring.evaluation.inception import average, maximum

    ones = torch.ones(1, 1, 5, 5)
    assert torch.equal(average(ones), ones)
    assert torch.equal(maximum(-ones), -ones)


def test_the_convention_is_part_of_the_identity(weights: Path, inception: InceptionFeatures) -> None:
    clean = build_extractor("inception", str(weights), resize="pillow-bicubic")
    assert not clean.identity.same(inception.identity)
    assert build_extractor("inception", str(weights)).identity == inception.identity


def test_wrong_inception_weights_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("shoestring.evaluation.features.INCEPTION_URL", "http://127.0.0.1:9/weights.pth")
    with pytest.raises(UserError, match=r"are not at .*home.*cannot be fetched.*put http"):
        InceptionFeatures()
    assert not list((tmp_path / "home").rglob("*.pth"))
    with pytest.raises(UserError, match="does not exist; it should be pt_inception"):
        InceptionFeatures(str(tmp_path / "none.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="is no file of weights, or damaged"):
        InceptionFeatures(str(tmp_path / "text.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        InceptionFeatures(str(tmp_path / "list.pth"))
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds another network than the Inception of FID"):
        InceptionFeatures(str(tmp_path / "other.pth"))


# -- DINOv2 and CLIP ---------------------------------------------------------------------------------------


def saved(name: str, folder: Path, **changes: Any) -> Path:
    """A tiny network of the right kind."""
    transformers = pytest.importorskip("transformers")
    heads = {"num_attention_heads": 2, "intermediate_size": 48}
    size = {"hidden_size": HUB[name][3], "num_hidden_layers": 1, **heads}
    torch.manual_seed(0)
    if name.startswith("clip"):
        size |= {"image_size": HUB[name][1], "patch_size": 14 if "l14" in name else 32, "projection_dim": 24}
        config = transformers.CLIPVisionConfig(**size | changes)
        model = transformers.CLIPVisionModelWithProjection(config)
    else:
        size |= {"image_size": 56, "patch_size": 14, "mlp_ratio": 2}
        model = transformers.Dinov2Model(transformers.Dinov2Config(**size | changes))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "width"), [("dinov2-vitb14", 768), ("clip-vitb32", 24), ("clip-vitl14-336", 24)]
)
def test_features_of_the_hub(name: str, width: int, tmp_path: Path) -> None:
    extractor = build_extractor(name, str(saved(name, tmp_path)))
    extractor.chunk = 4
    pixels = pictures(5, 40, 40)
    features = extractor(pixels)
    assert features.shape == (5, width) == (5, extractor.width)
    assert extractor(pixels[:0]).shape == (0, width)
    assert torch.equal(extractor(pixels[4:]), features[4:])
    assert features.std(dim=0).min() > 0
    x = extractor.preprocess(torch.full((1, 3, 9, 9), 255, dtype=torch.uint8))
    _, side, (mean, std), *_ = HUB[name]
    expected = torch.tensor([(1 - m) / s for m, s in zip(mean, std, strict=True)])
    torch.testing.assert_close(x[0, :, side // 2, side // 2], expected, atol=1e-5, rtol=1e-5)


def test_clip_sees_what_its_own_processor_shows_it(tmp_path: Path) -> None:
    """Of square pictures without overshoot; Pillow rounds to uint8 after each direction, we do not."""
    transformers = pytest.importorskip("transformers")
    extractor = HubFeatures("clip-vitb32", str(saved("clip-vitb32", tmp_path)))
    pixels = pictures(2, 64, 64) // 8 + 100
    processor = transformers.CLIPImageProcessorPil()
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]
    theirs = torch.as_tensor(np.stack(processor(images)["pixel_values"]))
    assert (extractor.preprocess(pixels) - theirs).abs().max() < 1.1 / 255 / 0.26


def test_wrong_networks_of_the_hub_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is dinov2"):
        build_extractor("clip-vitb32", str(saved("dinov2-vitb14", tmp_path / "dino")))
    with pytest.raises(UserError, match="takes pictures of 64 px in patches of 32, not"):
        build_extractor("clip-vitb32", str(saved("clip-vitb32", tmp_path / "small", image_size=64)))
    with pytest.raises(UserError, match="it has width 64 and patches of 32; clip-vitb32 has 768 and 32"):
        build_extractor("clip-vitb32", str(saved("clip-vitb32", tmp_path / "narrow", hidden_size=64)))
    with pytest.raises(UserError, match="extractor is 'vgg'; choose from efficientnet-lite0, inception"):
        build_extractor("vgg")
    with pytest.raises(UserError, match="come from pip; leave out the path"):
        build_extractor("efficientnet-lite0", "somewhere")
    with pytest.raises(UserError, match="only inception has a choice"):
        build_extractor("clip-vitb32", resize="pillow-bicubic")
