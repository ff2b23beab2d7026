"""The synthetic pictures and the oracle that reads them back."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from shoestring.data import shapes
from shoestring.data.oracle import read, satisfies
from shoestring.data.shapes import COLOURS, POSITIONS, RELATIONS, SHAPES, Group, Requirement, parse_caption
from shoestring.runtime import UserError

GROUPS = st.builds(Group, st.integers(1, 4), st.sampled_from(SHAPES), st.sampled_from(list(COLOURS)))


def picture(scene: shapes.Scene, side: int) -> torch.Tensor:
    return torch.from_numpy(shapes.render(scene.things, side))


@given(st.lists(GROUPS, min_size=1, max_size=2), st.sampled_from([None, *RELATIONS, *POSITIONS]))
def test_captions_parse_back(groups: list[Group], extra: str | None) -> None:
    relation = extra if extra in RELATIONS else None
    position = extra if extra in POSITIONS else None
    asked = Requirement(tuple(groups), relation, position)
    things = {(group.shape, group.colour) for group in groups}
    sensible = len(things) == len(groups) and sum(group.count for group in groups) <= 4
    if relation is not None:
        sensible &= [group.count for group in groups] == [1, 1]
    if position is not None:
        sensible &= [group.count for group in groups] == [1]
    if sensible:
        assert parse_caption(str(asked)) == asked
    elif len(groups) == 2 or extra is None or extra in POSITIONS:
        with pytest.raises(UserError):
            parse_caption(str(asked))


@pytest.mark.parametrize(
    "text", ["", "red circle", "a pink circle", "a red circles", "x" * 10_000, "a red  and"]
)
def test_other_texts_are_refused_in_one_short_sentence(text: str) -> None:
    with pytest.raises(UserError, match="not a caption of the shapes") as caught:
        parse_caption(text)
    assert len(str(caught.value)) < 500


def test_captions_read_like_english() -> None:
    assert str(Group(2, "cross", "black")) == "two black crosses"
    assert parse_caption(" A red  circle left of a green heart").relation == "left of"


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_oracle_is_exact_on_clean_pictures(side: int, split: str) -> None:
    kinds = Counter()
    for index in range(200):
        scene = shapes.scene(7, index, split=split)
        image = picture(scene, side)
        seen = read(image)
        verdict = satisfies(image, scene.caption)
        assert verdict.all, (scene.caption, seen)
        assert verdict.shape
        assert verdict.colour
        assert verdict.count
        by_place = {(round(s.x * 4), round(s.y * 4)): s for s in seen}
        for thing in scene.things:
            found = min(seen, key=lambda s, t=thing: (s.x - t.x) ** 2 + (s.y - t.y) ** 2)
            assert (found.shape, found.colour) == (thing.shape, thing.colour)
            assert abs(found.x - thing.x) < 0.02
            assert abs(found.y - thing.y) < 0.02
            assert abs(found.size - thing.size) < 0.03
        assert len(seen) == len(scene.things) == len(by_place)
        asked = parse_caption(scene.caption)
        kinds[len(scene.things), asked.relation is not None, asked.position is not None] += 1
    assert len(kinds) == 6  # single, with position, two, with relation, three, four


@pytest.mark.parametrize("side", [32, 64])
def test_the_oracle_stands_blur_and_noise(side: int) -> None:
    rng = np.random.default_rng(0)
    right = 0
    for index in range(150):
        scene = shapes.scene(3, index)
        blurred = Image.fromarray(shapes.render(scene.things, side).transpose(1, 2, 0)).filter(
            ImageFilter.GaussianBlur(0.6 * side / 32)
        )
        noisy = np.asarray(blurred) + rng.normal(0, 15, (side, side, 3))
        image = torch.from_numpy(noisy.round().clip(0, 255).astype(np.uint8)).permute(2, 0, 1)
        right += satisfies(image, scene.caption).all
    assert right >= 149


def test_the_oracle_sees_what_is_wrong() -> None:
    def scene_of(*things: tuple[str, str, float, float]) -> torch.Tensor:
        drawn = tuple(shapes.Thing(shape, colour, x, y, 0.36) for shape, colour, x, y in things)
        return torch.from_numpy(shapes.render(drawn, 32))

    circle = scene_of(("circle", "red", 0.26, 0.26))
    verdict = satisfies(circle, "a red square")
    assert (verdict.shape, verdict.colour, verdict.count, verdict.all) == (False, True, True, False)
    verdict = satisfies(circle, "a blue circle")
    assert (verdict.shape, verdict.colour, verdict.count, verdict.all) == (True, False, True, False)
    verdict = satisfies(circle, "two red circles")
    assert (verdict.shape, verdict.colour, verdict.count, verdict.all) == (True, True, False, False)
    assert satisfies(circle, "a red circle at the top left").all
    assert satisfies(circle, "a red circle in the center").position is False
    assert not satisfies(circle, "a red circle at the top right").all
    pair = scene_of(("circle", "red", 0.26, 0.5), ("heart", "green", 0.74, 0.5))
    assert satisfies(pair, "a red circle left of a green heart").all
    assert satisfies(pair, "a green heart right of a red circle").all
    assert satisfies(pair, "a red circle right of a green heart").relation is False
    assert satisfies(pair, "a red circle above a green heart").relation is False
    swapped = satisfies(pair, "a green circle and a red heart")
    assert swapped.shape
    assert swapped.colour
    assert swapped.count
    assert not swapped.all


@pytest.mark.parametrize("fill", [0, 128, 255, None])
def test_pictures_without_a_shape_satisfy_nothing(fill: int | None) -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (3, 32, 32), dtype=np.uint8) if fill is None else np.full((3, 32, 32), fill)
    for prompt in [*shapes.single_shape_prompts()[0], *shapes.single_shape_prompts()[1]]:
        assert not satisfies(torch.from_numpy(image.astype(np.uint8)), prompt).all


def test_a_blob_is_no_shape_and_an_unknown_colour_no_colour() -> None:
    image = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    image[:2, 4:9, 4:28] = 20  # a bar, yellow-less
    (seen,) = read(image)
    assert seen.shape is None
    image = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    image[:, 8:20, 8:20] = torch.tensor([0, 150, 170], dtype=torch.uint8)[:, None, None]
    (seen,) = read(image)
    assert (seen.shape, seen.colour) == ("square", None)


@given(st.floats(0, 0.5))
def test_held_out_combinations_leave_every_shape_and_colour(held_out: float) -> None:
    trained, held = shapes.combinations(held_out)
    assert not set(trained) & set(held)
    assert len(trained) + len(held) == len(set(trained + held)) == len(SHAPES) * len(COLOURS)
    assert bool(held) == (held_out > 0)
    assert {shape for shape, _ in trained} == set(SHAPES)
    assert {colour for _, colour in trained} == set(COLOURS)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 10**6))
def test_scenes_keep_to_their_split_and_inside_the_picture(seed: int, index: int) -> None:
    trained, held = (set(c) for c in shapes.combinations(0.1))
    for split in ("train", "held_out"):
        scene = shapes.scene(seed, index, split=split)
        assert scene == shapes.scene(seed, index, split=split)
        shown = {(thing.shape, thing.colour) for thing in scene.things}
        assert shown <= trained if split == "train" else shown & held
        for thing in scene.things:
            assert thing.size / 2 < min(thing.x, thing.y)
            assert max(thing.x, thing.y) < 1 - thing.size / 2


def test_load_draws_both_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "TRAIN_PICTURES", 300)
    monkeypatch.setattr(shapes, "HELD_OUT_PICTURES", 40)
    splits = shapes.load(24, 0.1, None)
    assert (len(splits.train), len(splits.held_out)) == (300, 40)
    assert not set(splits.train.captions) & set(splits.held_out.captions)
    assert splits.credit == ""
    fewer = shapes.load(24, 0, 20)
    assert len(set(fewer.train.captions)) == 20
    assert len(fewer.held_out) == 0
    with pytest.raises(UserError, match="at least 24"):
        shapes.load(16, 0.1, None)
    with pytest.raises(UserError, match=r"at most 0\.5"):
        shapes.load(32, 0.6, None)


def test_the_prompts_name_the_combinations() -> None:
    trained, held = shapes.single_shape_prompts()
    assert len(trained) == 27
    assert held == ["a red circle", "a blue square", "a purple triangle"]
