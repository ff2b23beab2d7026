"""Drawing pictures: from noise, or from a picture and a strength."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from shoestring.config import RunConfig, SamplingConfig
from shoestring.diffusion.process import Process, build_process
from shoestring.encoders.image import build_codec
from shoestring.encoders.text import build_text_encoder
from shoestring.interfaces import Conditioning, Denoiser, ImageCodec, TextEncoder
from shoestring.models.files import find_model, load_model
from shoestring.runtime import PRECISIONS, UserError, Workers, atomic_write, default_workers, stream
from shoestring.sampling.guidance import GuidedDenoiser, LeftOut
from shoestring.sampling.lowres import check_low, low_latents
from shoestring.sampling.samplers import solve
from shoestring.sampling.solvers import Noise, OnStep
from shoestring.tensors import Float, UInt8

PNG_KEY = "shoestring"
"""Key of the PNG text that holds a picture's parameters as JSON, among them ``prompt`` and ``seed``."""


def initial_noise(seed: int, images: Sequence[int], shape: tuple[int, int, int]) -> Float[Tensor, "B C H W"]:
    """Standard normal noise; that of one picture depends on (seed, its number) and not on the batch."""
    return torch.stack([torch.randn(shape, generator=stream(seed, "sample", i)) for i in images])


def fresh_noise(seed: int, images: Sequence[int], shape: tuple[int, int, int]) -> Noise:
    """What samplers add on the way, by step; that of one picture depends on (seed, its number, step) only."""

    def of_step(step: int) -> Float[Tensor, "B C H W"]:
        purpose = f"fresh-{step}"
        return torch.stack([torch.randn(shape, generator=stream(seed, purpose, i)) for i in images])

    return of_step


def no_fresh_noise(step: int) -> Tensor:
    """For samplers that draw none."""
    raise AssertionError(f"step {step} asks for noise, and none was given")


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    process: Process,
    conditioning: Conditioning,
    noise: Float[Tensor, "B C H W"],
    sampling: SamplingConfig,
    negative: Conditioning | None = None,
    start: Float[Tensor, "B C H W"] | None = None,
    strength: float = 1.0,
    on_step: OnStep | None = None,
    left_out: LeftOut | None = None,
    fresh: Noise = no_fresh_noise,
) -> Float[Tensor, "B C H W"]:
    """Draw latents.

    Args:
        denoiser: estimates x0.
        process: its noise process.
        conditioning: captions or classes; prepared here, once for the whole run.
        noise: standard normal.
        sampling: sampler, steps, guidance.
        negative: captions to move away from, instead of the empty one.
        start: latents to begin with (image to image).
        strength: with ``start``: share of the noise levels that are run; 1 forgets ``start``.
        on_step: called after each step with its number and the estimate of x0.
        left_out: decides which tokens are left out where ``sampling`` asks for it.
        fresh: standard normal numbers of every step, for samplers that draw some.

    Returns:
        Clean latents.
    """
    grid = process.grid(sampling, sampling.steps)
    x = grid[0][1] * noise
    if start is not None and strength < 1:
        skipped = min(sampling.steps, round(sampling.steps * (1 - strength)))
        grid = grid[skipped:]
        x = grid[0][0] * start + grid[0][1] * noise
    guided = GuidedDenoiser(denoiser, sampling, negative, left_out)
    return solve(guided, x, grid, guided.prepare(conditioning), sampling, fresh, on_step)


@dataclass(frozen=True)
class Pipeline:
    """A trained model with everything needed to draw from words."""

    config: RunConfig
    denoiser: Denoiser
    process: Process
    codec: ImageCodec
    text_encoder: TextEncoder | None
    """Of text-conditional models."""
    device: torch.device
    resolution: int
    nimg: int
    workers: Workers
    classes: tuple[str, ...] = ()
    """Class names by number, of class-conditional models."""
    strict: bool = True
    """Refuse pictures that are not finite; while training the guard decides what happens."""

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """The condition that prompts ask for, on the pipeline's device; an empty text asks for none.

        Args:
            texts: captions; for a class-conditional model names or numbers of classes.

        Returns:
            One condition a text.

        Raises:
            UserError: if a class is unknown, or an unconditional model is given words.
        """
        condition = self.config.model.condition
        if condition == "class":
            numbers = [class_number(text, self.classes, self.config.model.classes) for text in texts]
            return Conditioning(class_B=torch.tensor(numbers, device=self.device))
        if condition == "none":
            wanted = next((text for text in texts if text.strip()), None)
            if wanted is not None:
                raise UserError(f'the prompt is {wanted!r}, but this model is unconditional; use --prompt ""')
            return Conditioning.nothing(len(texts), self.device)
        assert self.text_encoder is not None
        captions = Conditioning(*self.text_encoder(texts))
        captions = captions.drop(torch.tensor([not text.strip() for text in texts]))
        text_BSD, mask_BS = captions.text_BSD, captions.text_mask_BS
        assert text_BSD is not None
        assert mask_BS is not None
        # Nobody attends to padding beyond the longest caption where captions are masked.
        longest = int(mask_BS.sum(1).max()) if self.config.model.mask_captions else mask_BS.shape[1]
        longest = max(1, longest)
        return Conditioning(text_BSD[:, :longest].to(self.device), mask_BS[:, :longest].to(self.device))

    def draw(
        self,
        prompts: Sequence[str],
        seed: int,
        images: Sequence[int],
        sampling: SamplingConfig,
        negative: str | None = None,
        start: UInt8[Tensor, "1 3 H W"] | None = None,
        strength: float = 1.0,
        on_step: Callable[[int, Tensor], None] | None = None,
        piece: int | None = None,
        low: UInt8[Tensor, "B 3 h w"] | None = None,
    ) -> UInt8[Tensor, "B 3 H W"]:
        """Draw one picture for each prompt.

        Args:
            prompts: captions; the empty string draws without a caption.
            seed: of the noise.
            images: number of each picture within the seed; equal numbers get equal noise.
            sampling: sampler, steps, guidance.
            negative: what to move away from.
            start: picture to begin with.
            strength: 0 keeps ``start``, 1 forgets it.
            on_step: called with the step's number and the pictures as estimated so far.
            piece: pictures that a worker takes at once, so that results do not depend on how many workers
                there are; ``None`` = one piece a worker.
            low: small pictures to enlarge, of super-resolution models.

        Returns:
            Pixels, on the CPU.

        Raises:
            UserError: if a prompt asks for what the model does not know, or a picture is not finite.
        """
        prompts = list(prompts)
        side = self.resolution // self.codec.downsampling
        shape = (self.codec.channels, side, side)
        noise = initial_noise(seed, images, shape).to(self.device)
        tokens, patches = self.config.tokens, (side // self.config.model.patch_size,) * 2
        token_noise = torch.stack(
            [torch.rand(patches[0] * patches[1], generator=stream(seed, "tokens", i)) for i in images]
        ).to(self.device)
        conditioning, against = self._captions(prompts, negative)
        if (low is None) != (self.config.superres is None):
            raise UserError(
                f"{self.config.name} draws from words, and a small picture is given; use shoestring sample"
                if low is not None
                else f"{self.config.name} enlarges pictures and draws nothing from words alone; use "
                "shoestring upscale, or shoestring eval with a protocol of crops"
            )
        if low is not None and self.config.superres is not None:
            check_low(low, self.resolution, self.config.superres.factor)
            image = low_latents(low, self.config.superres.factor, self.codec).to(self.device)
            conditioning = replace(conditioning, image=image)
            against = None if against is None else replace(against, image=image)
        self._check_guidance(sampling)
        begin = None
        if start is not None:
            moments = self.codec.encode(start).to(self.device)
            begin = self.codec.latents(moments, torch.zeros_like(noise[:1])).expand_as(noise)
        watch = None if on_step is None else lambda i, x0: on_step(i, self.codec.decode(x0).cpu())
        # Whoever watches gets whole steps of the whole batch, so that is one piece of work.
        pieces = self.workers.count if on_step is None else 1

        def run(piece: range) -> Tensor:
            rows = slice(piece.start, piece.stop)
            fresh = fresh_noise(seed, images[rows], shape)
            return sample_latents(
                self.denoiser,
                self.process,
                conditioning.part(rows),
                noise[rows],
                sampling,
                None if against is None else against.part(rows),
                None if begin is None else begin[rows],
                strength,
                watch,
                LeftOut(token_noise[rows], tokens.pattern, patches, tokens.block),
                lambda step: fresh(step).to(self.device),
            )

        parts = list(batches(len(prompts), piece or math.ceil(len(prompts) / pieces)))
        x0 = torch.cat(self.workers.map(run, parts))
        if self.strict:
            self._check_finite(x0, seed, images)
        return self.codec.decode(x0).cpu()

    def _check_guidance(self, sampling: SamplingConfig) -> None:
        """A student knows the scales that it was distilled for, and no others."""
        distill = self.config.distill
        if distill is None or distill.method == "codi":
            return
        low, high = distill.guidance if self.config.model.guidance_input else (1.0, 1.0)
        if not low <= sampling.guidance <= high:
            known = f"from {low:g} to {high:g}" if low < high else f"{low:g}"
            folded = "guidance is folded in already" if low == high else "it was distilled for those"
            raise UserError(
                f"sampling.guidance is {sampling.guidance:g}; for {self.config.name} it must be {known}, as "
                f"{folded}"
            )

    def _check_finite(self, x0: Tensor, seed: int, images: Sequence[int]) -> None:
        broken = (~x0.flatten(1).isfinite().all(dim=1)).nonzero()
        if len(broken):
            raise UserError(
                f"{len(broken)} of {len(x0)} pictures have NaN or infinite values (the first one has seed "
                f"{seed}, number {images[int(broken[0])]}); the model has diverged, or overflows in "
                f"{self.config.precision}: try precision=fp32, or an earlier checkpoint"
            )

    def _captions(self, prompts: list[str], negative: str | None) -> tuple[Conditioning, Conditioning | None]:
        """Captions and negatives padded to one length."""
        both = self.encode(prompts + ([] if negative is None else [negative] * len(prompts)))
        n = len(prompts)
        return both.part(slice(n)), None if negative is None else both.part(slice(n, None))


def class_prompts(count: int, names: Sequence[str]) -> list[str]:
    """What asks for each class: its name where it has one, as a name may be another one's number.

    Args:
        count: how many classes the model knows.
        names: class names by number; may be fewer.

    Returns:
        A prompt a class, in order.
    """
    return [names[i] if i < len(names) else str(i) for i in range(count)]


def class_number(text: str, names: Sequence[str], count: int) -> int:
    """The class meant by a prompt: its name, or its number; -1 for the empty prompt.

    Args:
        text: the prompt.
        names: class names by number; may be empty.
        count: how many classes the model knows.

    Returns:
        Its number.

    Raises:
        UserError: if there is no such class.
    """
    text = text.strip()
    if not text:
        return -1
    if text in names:
        return names.index(text)
    number = int(text) if text.lstrip("-").isdecimal() else None
    if number is not None and 0 <= number < count:
        return number
    near = difflib.get_close_matches(text, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    named = f" or one of {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else ""
    raise UserError(f"the prompt is {text!r}; a class is a number from 0 to {count - 1}{named}{hint}")


def load_pipeline(path: Path, device: torch.device, weights: str | None = None) -> Pipeline:
    """Load a model with its codec and text encoder.

    Args:
        path: run folder, checkpoint folder or model file.
        device: where to run.
        weights: see :func:`find_model`.

    Returns:
        The pipeline.

    Raises:
        UserError: if the model cannot be read.
    """
    config, network, facts = load_model(find_model(path, weights))
    process = build_process(config.process, facts.sigma_data)
    denoiser = process.denoiser(network.to(device), PRECISIONS[config.precision])
    codec = build_codec(config.data, device)
    encoder = build_text_encoder(config.data, device) if config.model.condition == "text" else None
    workers = Workers(default_workers(device))
    return Pipeline(
        config,
        denoiser,
        process,
        codec,
        encoder,
        device,
        facts.resolution,
        facts.nimg,
        workers,
        facts.classes,
    )


def batches(count: int, size: int) -> Iterator[range]:
    """0..count-1 in pieces of at most ``size``."""
    for first in range(0, count, size):
        yield range(first, min(count, first + size))


def to_pil(pixels: UInt8[Tensor, "3 H W"]) -> Image.Image:
    """One picture for Pillow."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def read_pixels(path: Path) -> UInt8[Tensor, "3 H W"]:
    """Pixels of a picture file as RGB.

    Args:
        path: PNG, JPEG or whatever Pillow reads.

    Returns:
        The pixels.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        with Image.open(path) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error})") from error


def save_png(path: Path, picture: Image.Image, parameters: dict[str, object]) -> None:
    """Write a PNG with how it was made in its metadata (text chunk ``shoestring``, JSON)."""
    info = PngImagePlugin.PngInfo()
    info.add_text(PNG_KEY, json.dumps(parameters))
    atomic_write(path, partial(picture.save, format="PNG", pnginfo=info))


def picture_grid(pictures: UInt8[Tensor, "B 3 H W"], columns: int, zoom: int = 1) -> Image.Image:
    """Pictures side by side on white, each enlarged ``zoom`` times without smoothing."""
    n, _, h, w = pictures.shape
    rows, gap = math.ceil(n / columns), 2
    sheet = Image.new("RGB", (columns * (w * zoom + gap) + gap, rows * (h * zoom + gap) + gap), "white")
    for i in range(n):
        tile = to_pil(pictures[i]).resize((w * zoom, h * zoom), Image.Resampling.NEAREST)
        sheet.paste(tile, (gap + i % columns * (w * zoom + gap), gap + i // columns * (h * zoom + gap)))
    return sheet
