"""Published sets: where each is, how it is read, what MicroDiT kept of it, as declarations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from shoestring.data.filters import Filters, Threshold
from shoestring.data.readers.base import Options
from shoestring.runtime import UserError

SOURCE = "MicroDiT (arXiv 2407.15811) and its released code, datasets/prepare"
HERE = "PATH"
"""Stands in a source for the folder or file that the user has downloaded."""


@dataclass(frozen=True)
class Published:
    """A set of pictures that others published."""

    name: str
    title: str
    source: str
    """As :func:`shoestring.data.readers.open_reader` takes it; ``PATH`` is what the user downloaded."""
    home: str
    """Where it is described, and had."""
    licence: str
    pictures: int
    """About; of MicroDiT's sets those that its paper trained on."""
    gigabytes: int | None
    """About, as downloaded; ``None``: not known."""
    prepare: str
    """What to do before ingestion; empty: nothing."""
    options: Options = field(default_factory=Options)
    images: str = ""
    """Where the pictures lie below ``PATH``, if not beside the file that names them."""
    filters: Filters = field(default_factory=Filters)
    confirmed: bool = True
    """Whether names of files and columns are known from the set's own users; else they may need a change."""

    @property
    def needs_path(self) -> bool:
        """Whether it has to be downloaded first."""
        return HERE in self.source

    def spec(self, path: Path | str | None = None) -> str:
        """The source for a reader.

        Args:
            path: what was downloaded; only for sets that need it, or instead of the address on the web.

        Returns:
            ``KIND:PATH``.

        Raises:
            UserError: if the path is needed and missing.
        """
        if path is not None:
            return self.source.replace(HERE, str(path)) if self.needs_path else f"{self.kind}:{path}"
        if self.needs_path:
            raise UserError(
                f"{self.name} has to be downloaded first ({self.home}): {self.prepare}; give its place with "
                "--path"
            )
        return self.source

    @property
    def kind(self) -> str:
        """Of the reader."""
        return self.source.partition(":")[0]


MIN_SIDE = Filters(min_side=256)
PUBLISHED: dict[str, Published] = {
    each.name: each
    for each in (
        Published(
            name="cc12m",
            title="Conceptual 12M",
            source="webdataset:https://huggingface.co/datasets/pixparse/cc12m-wds/resolve/main/"
            "cc12m-train-{0000..2175}.tar",
            home="https://huggingface.co/datasets/pixparse/cc12m-wds",
            licence="captions and links: free for any use (Google); pictures belong to their owners",
            pictures=10_900_000,
            gigabytes=None,
            prepare="",
            filters=MIN_SIDE,
        ),
        Published(
            name="sa1b",
            title="SA-1B with captions by LLaVA",
            source=f"folder:{HERE}",
            home="https://ai.meta.com/datasets/segment-anything-downloads and "
            "https://huggingface.co/datasets/PixArt-alpha/SAM-LLaVA-Captions10M",
            licence="SA-1B licence: research only",
            pictures=11_100_000,
            gigabytes=10_000,
            prepare="unpack the pictures (sa_N.jpg) and the captions (sa_N.txt) into one folder",
            filters=MIN_SIDE,
        ),
        Published(
            name="textcaps",
            title="TextCaps, five captions a picture",
            source=f"parquet:{HERE}",
            home="https://huggingface.co/datasets/HuggingFaceM4/TextCaps",
            licence="CC BY 4.0; pictures of Open Images",
            pictures=110_000,
            gigabytes=None,
            prepare="download the Parquet files of train and validation, as the hub converts them "
            "(revision refs/convert/parquet)",
            options=Options(image="image", captions=("reference_strs",)),
            confirmed=False,
        ),
        Published(
            name="journeydb",
            title="JourneyDB, pictures of Midjourney",
            source=f"table:{HERE}/train/train_anno_realease_repath.jsonl",
            home="https://huggingface.co/datasets/JourneyDB/JourneyDB",
            licence="JourneyDB terms: research only, on request",
            pictures=4_200_000,
            gigabytes=None,
            prepare="ask for access, and unpack train/imgs/*.tgz and the annotations (.jsonl.tgz)",
            images="train/imgs",
            options=Options(image="img_path", captions=("prompt",)),
            filters=MIN_SIDE,
        ),
        Published(
            name="diffusiondb",
            title="DiffusionDB, pictures of Stable Diffusion",
            source=f"table:{HERE}/metadata-large.parquet",
            home="https://huggingface.co/datasets/poloclub/diffusiondb",
            licence="CC0 1.0",
            pictures=10_700_000,
            gigabytes=6_500,
            prepare="unpack the parts of DiffusionDB Large below PATH/images",
            options=Options(image="image_name", captions=("prompt",), numbers=("image_nsfw", "prompt_nsfw")),
            filters=replace(
                MIN_SIDE,
                thresholds=(Threshold("image_nsfw", "<=", 0.2), Threshold("prompt_nsfw", "<=", 0.2)),
            ),
        ),
        Published(
            name="coco2014-val",
            title="COCO 2014, validation: what FID-30K is measured on",
            source=f"coco:{HERE}/annotations/captions_val2014.json",
            home="https://cocodataset.org/#download",
            licence="annotations CC BY 4.0; pictures of Flickr under their own",
            pictures=40_504,
            gigabytes=6,
            prepare="unpack val2014.zip and annotations_trainval2014.zip into one folder",
            images="val2014",
        ),
        Published(
            name="imagenet",
            title="ImageNet-1k; the caption is the name of the class",
            source="hf:ILSVRC/imagenet-1k",
            home="https://huggingface.co/datasets/ILSVRC/imagenet-1k",
            licence="ImageNet terms: research and teaching only, on request",
            pictures=1_281_167,
            gigabytes=150,
            prepare="",
            options=Options(image="image", captions=("label",), split="train"),
        ),
    )
}


def published(name: str) -> Published:
    """A published set by name.

    Args:
        name: one of ``PUBLISHED``.

    Returns:
        Its declaration; sizes of pictures are filtered as MicroDiT did (TextCaps and COCO are not).

    Raises:
        UserError: if there is none of that name.
    """
    if name not in PUBLISHED:
        raise UserError(f"no published set is called {name!r}; known are {', '.join(PUBLISHED)}")
    return PUBLISHED[name]
