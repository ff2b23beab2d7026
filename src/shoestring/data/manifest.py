"""What a store says of itself: where it came from, what made its columns, counts, statistics."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from shoestring.interfaces import Identity

SCHEMA_VERSION = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LatentsColumn(_Frozen):
    """Moments of all pictures at one resolution, in the column ``moments_NAME`` of the records.

    Moments are ``M h w`` values in C order. With several buckets the column ``bucket_NAME`` says which.
    """

    name: str
    codec: Identity
    resolution: int
    """Side of a square of the same area, in pixels."""
    buckets: tuple[tuple[int, int], ...]
    """Height and width in pixels; one entry where all pictures have one shape."""
    counts: tuple[int, ...]
    """Pictures in each bucket."""
    channels: int
    moment_channels: int
    downsampling: int
    dtype: Literal["float16", "uint8"]
    mirrored: bool = False
    """Whether ``mirror_NAME`` holds the moments of the mirrored pictures."""
    sampled: bool = False
    """Imported draws, already model latents, instead of moments: there is no posterior to sample."""
    mean: tuple[float, ...]
    """Of the model latents, a channel."""
    std: tuple[float, ...]
    sigma: float
    """Standard deviation of the model latents over all values: EDM's sigma_data."""

    @property
    def column(self) -> str:
        """The moments."""
        return f"moments_{self.name}"

    @property
    def mirror_column(self) -> str:
        """The moments of the mirrored pictures."""
        return f"mirror_{self.name}"

    @property
    def bucket_column(self) -> str:
        """Number of the bucket."""
        return f"bucket_{self.name}"

    def shape(self, bucket: int) -> tuple[int, int, int]:
        """Channels, height and width of the stored moments of a bucket."""
        height, width = self.buckets[bucket]
        return self.moment_channels, height // self.downsampling, width // self.downsampling


class TextColumn(_Frozen):
    """Embeddings of all captions by one encoder, in three columns of the texts.

    ``NAME_tokens``: the rows of the stored positions, one after another; ``NAME_scale``: with int8 one
    float16 a position; ``NAME_true``: how many positions, from the first, are real tokens.
    """

    name: str
    encoder: Identity
    width: int
    max_tokens: int
    positions: Literal["true", "all"]
    """``true``: stored up to the true length. ``all``: every position, for models that attend to padding."""
    dtype: Literal["int8", "float16"]

    @property
    def columns(self) -> list[str]:
        """Their names in the table of texts."""
        scale = [f"{self.name}_scale"] if self.dtype == "int8" else []
        return [f"{self.name}_tokens", *scale, f"{self.name}_true"]


class FeatureColumn(_Frozen):
    """Features of all pictures by a teacher, float16 in the column ``feature_NAME`` of the records."""

    name: str
    extractor: Identity
    resolution: int
    """Side of the square that the teacher saw, in pixels."""
    width: int

    @property
    def column(self) -> str:
        """In the records."""
        return f"feature_{self.name}"


class CaptionsColumn(_Frozen):
    """Captions of one origin: the column ``caption_NAME`` of the records, lists of rows of the texts."""

    name: str
    origin: str
    """In words: the source, or the model that wrote them."""

    @property
    def column(self) -> str:
        """In the records."""
        return f"caption_{self.name}"


class SourceFacts(_Frozen):
    """Where records came from."""

    kind: str
    path: str
    licence: str = ""
    read: int
    """Records read; as many as were kept and rejected."""
    kept: int
    rejected: dict[str, int] = Field(default_factory=dict)
    """Reason to number."""


class Manifest(_Frozen):
    """The manifest of a store."""

    schema_version: int = SCHEMA_VERSION
    made_by: str
    """Version of shoestring."""
    records: int
    texts: int
    unit_rows: int
    """Records of a work unit, which is a fragment of the table."""
    has_images: bool
    """Whether the column ``image`` holds the original files."""
    sources: tuple[SourceFacts, ...]
    captions: tuple[CaptionsColumn, ...]
    latents: tuple[LatentsColumn, ...] = ()
    text: tuple[TextColumn, ...] = ()
    features: tuple[FeatureColumn, ...] = ()
    tables: dict[str, int] = Field(default_factory=dict)
    """Table to version: what this version of the store consists of."""
