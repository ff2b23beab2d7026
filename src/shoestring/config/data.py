"""Settings of the data: where pictures and captions come from, and what encodes them."""

from __future__ import annotations

from typing import Literal

from shoestring.config.base import Frozen, Positive, Share, setting

CODEC_DOWNSAMPLING = {
    "pixels": 1,
    "autoencoder-kl": 8,
    "autoencoder-dc": 32,
    "autoencoder-tiny": 8,
    "taef2": 8,
}
"""Pixels per latent along one side, as far as it is known without the weights (the usual ones)."""


class StoreConfig(Frozen):
    """One store of a mixture."""

    path: str = setting("folder or URL", min_length=1)
    weight: float = setting("share of the samples, or views per epoch (data.mix); above 0", 1.0)


class DataConfig(Frozen):
    """Where the pictures and captions come from."""

    source: Literal["openmoji", "shapes", "folder", "cifar10", "store"] = setting(
        "folder, store (shoestring data prepare), openmoji, shapes or cifar10", "folder"
    )
    path: str | None = setting(
        "folder: pictures with .txt, or metadata.jsonl/.csv/.parquet; store: folder or URL; cifar10: folder",
        None,
    )
    stores: tuple[StoreConfig, ...] = setting("store: several, mixed, instead of path", ())
    mix: Literal["proportion", "repeats"] = setting(
        "stores: weights are shares of the samples, or views of every record per epoch", "proportion"
    )
    captions: tuple[str, ...] = setting(
        "store: columns of captions; each sample is drawn one of all", ("source",), min_length=1
    )
    window_blocks: int | None = setting(
        "store: blocks of 1,024 records shuffled together; null = all, of a store behind a URL 16", None, ge=1
    )
    cache: str | None = setting("store behind a URL: local folder for its blocks; null = in the run", None)
    cache_gb: Positive = setting("store behind a URL: what the local blocks may take", 20.0)
    buckets: int = setting("folder: shapes of pictures by aspect ratio; 1 = squares", 1, ge=1, le=99)
    bucket_aspect: float = setting("folder: longer side by shorter of the longest shapes", 4.0, ge=1, le=8)
    max_captions: int | None = setting(
        "openmoji, shapes: train on this many captions (chosen by hash); null = all; a folder is used whole",
        None,
        ge=1,
    )
    held_out: Share = setting("share kept out of training (by hash); cifar10: its test file", 0.1)
    split: Literal["captions", "pictures"] = setting(
        "hold out whole captions, or pictures of captions that are trained too", "captions"
    )
    text_encoder: Literal["hashing", "minilm", "clip", "t5"] = setting(
        "hashing (no weights), minilm, clip or t5 (transformers)", "minilm"
    )
    text_encoder_path: str | None = setting(
        "clip, t5, minilm: hub name or folder of the weights; minilm, null: those from pip", None
    )
    text_encoder_dtype: Literal["fp32", "bf16", "fp16"] = setting(
        "clip, t5, minilm: precision the encoder runs in", "fp32"
    )
    max_tokens: int = setting("caption tokens kept; longer captions are cut", 77, ge=2, le=512)
    codec: Literal["pixels", "autoencoder-kl", "autoencoder-dc", "autoencoder-tiny", "taef2"] = setting(
        "pixels, or for latents autoencoder-kl, -dc or -tiny (diffusers) or taef2", "pixels"
    )
    codec_path: str | None = setting(
        "autoencoder-...: hub name or folder of the weights; taef2: folder of its two files", None
    )
    codec_dtype: Literal["fp32", "bf16", "fp16"] = setting(
        "autoencoder-..., taef2: precision the codec runs in", "fp32"
    )
    flip: bool = setting("mirror half of the pictures", False)
    caption_drop: Share = setting("share of samples trained with the empty caption", 0.1)
