"""Objects and colours by networks of the hub: what goes in, what comes out, wrong weights. No download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shoestring.evaluation.detection import (
    GREY,
    ClipColours,
    Mask2FormerDetector,
    box_of,
    class_names,
    cut_out,
    middle_square,
)
from shoestring.evaluation.geneval import CLASSES, COLOURS, Detection
from shoestring.runtime import UserError
from shoestring.sampling.generate import to_pil

transformers = pytest.importorskip("transformers")


def picture(side: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator)


# -- names, boxes, cut-outs --------------------------------------------------------------------------------


def test_classes_have_genevals_names() -> None:
    labels = dict(enumerate(CLASSES)) | {0: "Person", 64: "mouse", 65: "remote", 66: "keyboard", 80: "grass"}
    named = class_names(labels)
    assert [named[i] for i in range(80)] == list(CLASSES)
    assert 80 not in named
    with pytest.raises(ValueError, match="does not know cat"):
        class_names({number: name for number, name in labels.items() if name != "cat"})


def test_boxes_and_cut_outs() -> None:
    mask = np.zeros((8, 9), dtype=bool)
    mask[2:5, 3] = mask[4, 3:7] = True
    assert box_of(mask) == (3.0, 2.0, 7.0, 5.0)
    pixels = torch.full((3, 8, 9), 7, dtype=torch.uint8)
    cut = cut_out(pixels, Detection("cup", 1.0, box_of(mask), mask))
    assert cut.shape == (1, 3, 3, 4)
    expected = torch.where(torch.from_numpy(mask[2:5, 3:7]), 7, GREY).to(torch.uint8)
    assert torch.equal(cut[0, 1], expected)
    assert cut_out(pixels, Detection("cup", 1.0, (8.9, 7.9, 20.0, 20.0))).shape == (1, 3, 1, 1)


# -- the networks ------------------------------------------------------------------------------------------


def detector_folder(folder: Path, **changes: Any) -> Path:
    """A tiny Mask2Former with drawn weights."""
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=8,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=8,
        num_queries=12,
        id2label=dict(enumerate(CLASSES)),
        **changes,
    )
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    transformers.Mask2FormerImageProcessorPil(size=size, num_labels=80).save_pretrained(folder)
    return folder


def test_the_detector_gives_objects_with_masks_on_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoestring.evaluation.detection.THRESHOLD", 0.0)  # drawn weights are sure of nothing
    detector = Mask2FormerDetector(str(detector_folder(tmp_path)))
    found = detector(picture(40))
    assert found
    for each in found:
        assert each.name in CLASSES
        assert 0 <= each.score <= 1
        assert each.mask.shape == (40, 40)
        assert each.box == box_of(each.mask)
    again = detector(picture(40))
    assert [each.score for each in again] == [each.score for each in found]


def clip_folder(folder: Path) -> Path:
    """A tiny CLIP with drawn weights and a tokenizer of letters."""
    torch.manual_seed(0)
    common = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    letters = [chr(i) for i in range(97, 123)] + ["-"]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir(exist_ok=True)
    import json

    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    config = transformers.CLIPConfig(
        # a text is known by what stands at its end, so the network must know the mark of the end
        text_config=common
        | {"vocab_size": len(words), "max_position_embeddings": 64, "projection_dim": 12}
        | {"bos_token_id": 0, "eos_token_id": 1},
        vision_config=common | {"image_size": 32, "patch_size": 16, "projection_dim": 12},
        projection_dim=12,
    )
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():  # as they are drawn, all descriptions are nearly alike
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    model.save_pretrained(folder)
    return folder


def test_colours_are_those_whose_descriptions_are_most_alike(tmp_path: Path) -> None:
    colours = ClipColours(str(clip_folder(tmp_path)))
    pixels = picture(40)
    objects = [Detection("cup", 1.0, (0.0, 0.0, 20.0, 20.0)), Detection("cup", 1.0, (5.0, 9.0, 30.0, 40.0))]
    found = colours(pixels, objects)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = transformers.CLIPImageProcessorPil(**sides)
    expected = []
    for each in objects:  # as the network's own processor shows it the object
        x = torch.as_tensor(np.stack(processor([to_pil(cut_out(pixels, each)[0])])["pixel_values"]))
        seen = colours._network.get_image_features(pixel_values=x)
        seen = seen if isinstance(seen, torch.Tensor) else seen.pooler_output
        likeness = torch.nn.functional.normalize(seen, dim=1) @ colours._colours_of("cup").T
        expected.append(COLOURS[int(likeness.argmax())])
    assert found == expected
    assert colours(pixels, objects[1:]) == found[1:]
    assert colours(pixels, []) == []
    described = colours._colours_of("cup")
    torch.testing.assert_close(described.norm(dim=1), torch.ones(len(COLOURS)))


def test_of_oblong_objects_the_middle_is_looked_at() -> None:
    pixels = torch.zeros(1, 3, 20, 90, dtype=torch.uint8)
    pixels[..., 30:60] = 200
    square = middle_square(pixels, 40)
    assert square.shape == (3, 40, 40)
    assert (square == 200).double().mean() > 0.9, "the ends are cut off, and nothing is squashed"


def test_wrong_networks_are_sentences(tmp_path: Path) -> None:
    clip, detector = clip_folder(tmp_path / "clip"), detector_folder(tmp_path / "detector")
    with pytest.raises(UserError, match="is clip"):
        Mask2FormerDetector(str(clip))
    with pytest.raises(UserError, match="is mask2former"):
        ClipColours(str(detector))
    folder = detector_folder(tmp_path / "things")
    config = transformers.Mask2FormerConfig.from_pretrained(folder)
    config.id2label = {i: f"thing {i}" for i in range(80)}
    config.save_pretrained(folder)
    with pytest.raises(UserError, match="does not know person"):
        Mask2FormerDetector(str(folder))
    with pytest.raises(UserError, match="weights of the detector is '/nowhere/at/all'"):
        Mask2FormerDetector("/nowhere/at/all")
