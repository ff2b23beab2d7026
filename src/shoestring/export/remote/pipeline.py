"""Pictures from a network trained by shoestring, with diffusers alone.

``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` reads this file. From the same latents
it draws what ``shoestring sample`` draws.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Condition = tuple[Any, Any, Any]
"""Caption tokens B S D, their mask B S (true at real ones), and classes B (-1 = none)."""
GUIDANCE_FEATURES = 64


class ShoestringPipeline(DiffusionPipeline):
    """Words, or a class, to pictures.

    Args:
        scheduler: the noise process, its grid and samplers.
        transformer: the network, or
        unet: the network, a U-Net of diffusers.
        vae: decodes latents; none where they are pixels.
        text_encoder: of transformers; none without captions, and for hashed words.
        tokenizer: beside it.
        class_table: classes as captions, for U-Nets.
        condition: text, class or none.
        text: hashing, minilm, clip or t5.
        text_width: of hashed words.
        max_tokens: of a caption.
        mask_captions: whether the network sees real tokens only.
        text_dtype: precision of the text encoder.
        vae_dtype: precision of the autoencoder.
        precision: bf16 runs the network under autocast, as it was trained.
        guidance_scale: usual guidance.
        guidance_interval: noise-to-signal ratios between which is guided.
        resolution: side of the pictures.
        channels: of the latents.
        downsampling: pixels a latent, along one side.
        fold: latents a side that become channels before a U-Net.
        classes: how many.
        class_names: by number.
    """

    _optional_components = ["transformer", "unet", "vae", "text_encoder", "tokenizer", "class_table"]  # noqa: RUF012
    model_cpu_offload_seq = "text_encoder->class_table->transformer->unet->vae"

    def __init__(
        self,
        scheduler: Any,
        transformer: Any = None,
        unet: Any = None,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        class_table: Any = None,
        condition: str = "text",
        text: str = "hashing",
        text_width: int = 256,
        max_tokens: int = 77,
        mask_captions: bool = False,
        text_dtype: str = "fp32",
        vae_dtype: str = "fp32",
        precision: str = "fp32",
        guidance_scale: float = 1.0,
        guidance_interval: list[float] | None = None,
        resolution: int = 256,
        channels: int = 3,
        downsampling: int = 1,
        fold: int = 1,
        classes: int = 0,
        class_names: list[str] = [],  # noqa: B006  (a value of the pipeline's config; never changed)
    ) -> None:
        super().__init__()
        self.register_modules(
            scheduler=scheduler,
            transformer=transformer,
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            class_table=class_table,
        )
        self.register_to_config(
            condition=condition,
            text=text,
            text_width=text_width,
            max_tokens=max_tokens,
            mask_captions=mask_captions,
            text_dtype=text_dtype,
            vae_dtype=vae_dtype,
            precision=precision,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            resolution=resolution,
            channels=channels,
            downsampling=downsampling,
            fold=fold,
            classes=classes,
            class_names=class_names,
        )
        for part, dtype in ((text_encoder, text_dtype), (vae, vae_dtype)):
            if part is not None and dtype != "fp32":
                part.to(DTYPES[dtype])

    # -- the condition ---------------------------------------------------------------------------------

    def encode_prompt(self, texts: Sequence[str]) -> Condition:
        """The condition that prompts ask for; an empty one asks for none.

        Args:
            texts: captions; of a class-conditional model names or numbers of classes.

        Returns:
            Caption tokens, mask, classes: those that the model knows.

        Raises:
            ValueError: if a class is unknown.
        """
        config, device = self.config, self._execution_device
        if config.condition != "text":
            return None, None, torch.tensor([self._class_of(text) for text in texts], device=device)
        text_BSD, mask_BS = self._encoded([text.encode("utf-8", "replace").decode() for text in texts])
        for i, text in enumerate(texts):
            if not text.strip():
                text_BSD[i], mask_BS[i] = 0.0, torch.arange(mask_BS.shape[1]) == 0
        longest = max(1, int(mask_BS.sum(1).max())) if config.mask_captions else mask_BS.shape[1]
        return text_BSD[:, :longest].to(device), mask_BS[:, :longest].to(device), None

    def _class_of(self, text: str) -> int:
        text, names = text.strip(), list(self.config.class_names)
        if not text:
            return -1
        if self.config.condition == "none":
            raise ValueError(f"the prompt is {text!r}, but this model is unconditional; leave it out")
        if text in names:
            return names.index(text)
        number = int(text) if text.isdecimal() else -1
        if not 0 <= number < self.config.classes:
            known = f" or one of {', '.join(names[:10])}" if names else ""
            raise ValueError(
                f"the prompt is {text!r}; a class is a number from 0 to {self.config.classes - 1}{known}"
            )
        return number

    @torch.no_grad()
    def _encoded(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Caption tokens and their mask, padded to ``max_tokens``, on the CPU."""
        length = self.config.max_tokens
        if self.config.text == "hashing":
            return hashed(texts, length, self.config.text_width)
        rows = self.tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        mask_BS = torch.tensor([[s < len(row) for s in range(length)] for row in rows])
        device = self.text_encoder.device
        causal = self.config.text == "clip"  # its padding carries the caption too
        longest = length if causal else max(map(len, rows))
        padding = 0 if causal else self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows], device=device)
        if causal:
            return self.text_encoder(ids).last_hidden_state.float().cpu(), mask_BS
        seen = mask_BS[:, :longest].to(device)
        states = self.text_encoder(input_ids=ids, attention_mask=seen.long()).last_hidden_state.float()
        states = states.masked_fill(~seen[:, :, None], 0.0) * (2.0 if self.config.text == "minilm" else 1.0)
        return torch.nn.functional.pad(states, (0, 0, 0, length - longest)).cpu(), mask_BS

    def _nothing(self, condition: Condition) -> Condition:
        """The empty condition beside another one."""
        text_BSD, mask_BS, class_B = condition
        if class_B is not None:
            return None, None, torch.full_like(class_B, -1)
        mask_BS = torch.zeros_like(mask_BS)
        mask_BS[:, 0] = True
        return torch.zeros_like(text_BSD), mask_BS, None

    # -- the network -----------------------------------------------------------------------------------

    @property
    def _takes_scale(self) -> bool:
        """Whether the network was distilled with the scale of guidance as an input."""
        if self.transformer is not None:
            return bool(self.transformer.config.guidance_input)
        return self.unet.config.time_cond_proj_dim is not None

    def _estimate(
        self, xt: Tensor, level: tuple[float, float], condition: Condition, scale: float = 1.0
    ) -> Tensor:
        """Of the clean latents, by one network call; ``scale`` is for networks that take it."""
        network = self.transformer if self.transformer is not None else self.unet
        alpha, sigma = (torch.full((len(xt),), value, dtype=xt.dtype, device=xt.device) for value in level)
        _, _, scale_in, time = self.scheduler.coefficients(alpha, sigma)
        text_BSD, mask_BS, class_B = condition
        guidance = torch.full_like(sigma, scale) if self._takes_scale else None
        low = self.config.precision == "bf16" and network.dtype == torch.float32
        with torch.autocast(xt.device.type, torch.bfloat16, enabled=low, cache_enabled=False):
            scaled = (scale_in[:, None, None, None] * xt).to(network.dtype)
            text_BSD = None if text_BSD is None else text_BSD.to(network.dtype)
            if self.transformer is not None:
                output = network(scaled, time, text_BSD, mask_BS, class_B, guidance)[0]
            else:
                if self.class_table is not None:
                    only = self.config.condition == "none"
                    text_BSD = self.class_table(torch.zeros_like(class_B) if only else class_B)
                seen = mask_BS if self.config.mask_captions else None
                fold = self.config.fold
                output = network(
                    folded(scaled, fold),
                    time,
                    text_BSD,
                    timestep_cond=None if guidance is None else guidance_features(guidance).to(scaled.dtype),
                    encoder_attention_mask=seen,
                    return_dict=False,
                )
                output = unfolded(output[0], fold)
        return self.scheduler.denoised(output, xt, alpha, sigma)

    def _guided(
        self,
        xt: Tensor,
        level: tuple[float, float],
        strong: Condition,
        weak: Condition | None,
        scale: float,
    ) -> Tensor:
        """weak + scale (strong - weak), where guidance is wanted."""
        if self._takes_scale:
            return self._estimate(xt, level, strong, scale)
        interval = self.config.guidance_interval
        outside = interval is not None and not interval[0] <= level[1] / max(level[0], 1e-12) <= interval[1]
        if weak is None or scale == 1 or outside:
            return self._estimate(xt, level, strong)
        if scale == 0:
            return self._estimate(xt, level, weak)
        both = mapped(lambda s, w: torch.cat([s, w]), strong, weak)
        s, w = self._estimate(torch.cat([xt, xt]), level, both).chunk(2)
        return w + scale * (s - w)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = "",
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw.

        Args:
            prompt: captions, or names or numbers of classes; empty = without.
            negative_prompt: what to move away from, instead of nothing.
            num_inference_steps: noise levels; by default as the model was exported with.
            guidance_scale: 1 = off, 0 = without the caption.
            sampler: heun, euler, ddim, dpmpp-2m and so on.
            height: of the pictures; by default that of training.
            width: likewise.
            num_images_per_prompt: pictures of each prompt.
            generator: draws the noise; one, or one a picture.
            latents: standard normal noise ``B C H W`` to begin with; it is scaled here.
            output_type: pil, np or pt (values from 0 to 1), or latent.
            return_dict: an output with ``images``, else a tuple.

        Returns:
            The pictures.

        Raises:
            ValueError: if sides, prompts or latents do not fit.
        """
        config, device = self.config, self._execution_device
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        sides = (height or config.resolution, width or config.resolution)
        network = self.transformer if self.transformer is not None else self.unet
        unit = config.downsampling * (
            network.config.patch_size if self.transformer is not None else config.fold
        )
        if any(side % unit for side in sides):
            raise ValueError(
                f"height and width are {sides[0]} and {sides[1]}; they must be multiples of {unit}"
            )
        shape = (len(prompts), config.channels, *(side // config.downsampling for side in sides))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {list(latents.shape)}; {list(shape)} is needed")
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        if negative_prompt is not None and self._takes_scale:
            raise ValueError(
                "negative_prompt is given, but this model was distilled with guidance as an input and makes "
                "no second prediction; leave it out"
            )
        against = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        if against is not None and len(against) != len(prompts):
            raise ValueError(f"{len(against)} negative prompts are given for {len(prompts)} pictures")
        both = self.encode_prompt([*prompts, *(against or [])])
        strong = mapped(lambda each: each[: len(prompts)], both)
        weak: Condition | None = self._nothing(strong)
        if against is not None:
            weak = mapped(lambda each: each[len(prompts) :], both)
        elif strong[2] is not None and bool((strong[2] < 0).all()):
            weak = None
        self.scheduler.set_timesteps(num_inference_steps, device, sampler)
        x = self.scheduler.init_noise_sigma * latents.to(device, torch.float32)
        fresh = generator[0] if isinstance(generator, list) else generator
        for level in self.progress_bar(self.scheduler.levels):
            x = self.scheduler.step(self._guided(x, level, strong, weak, scale), x, fresh)
        images = x if output_type == "latent" else self._pictures(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # -- pictures --------------------------------------------------------------------------------------

    def _pictures(self, latents: Tensor, output_type: str) -> Any:
        """Pixels of latents: (latents / scale + shift), decoded."""
        values = latents
        if self.vae is not None:
            about = self.vae.config

            def statistic(name: str, otherwise: float) -> Tensor:
                found = about.get(name)
                given = [otherwise] if found is None else found if isinstance(found, Sequence) else [found]
                return torch.tensor(given, dtype=torch.float32, device=latents.device).view(-1, 1, 1)

            by_channel = about.get("latents_mean") is not None
            shift = statistic("latents_mean", 0.0) if by_channel else statistic("shift_factor", 0.0)
            scale = statistic("scaling_factor", 1.0) / statistic("latents_std", 1.0)
            values = self.vae.decode((latents / scale + shift).to(self.vae.dtype)).sample
        if output_type == "pt":
            return ((values.float() + 1) / 2).clamp(0, 1)
        bytes_BCHW = ((values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        pixels = bytes_BCHW.permute(0, 2, 3, 1).cpu().numpy()
        return pixels / 255 if output_type == "np" else [Image.fromarray(picture) for picture in pixels]


def mapped(function: Callable[..., Tensor], *conditions: Condition) -> Condition:
    """A function of each part of some conditions that is there."""
    text, mask, label = (
        None if parts[0] is None else function(*parts) for parts in zip(*conditions, strict=True)
    )
    return text, mask, label


def guidance_features(guidance_B: Tensor) -> Tensor:
    """What distilled U-Nets see of the scale of guidance: cosines and sines of 10 times it."""
    half = GUIDANCE_FEATURES // 2
    j = torch.arange(half, dtype=torch.float32, device=guidance_B.device)
    angles = 10.0 * guidance_B.float()[:, None] * torch.exp(-math.log(10_000) * j / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def folded(x: Tensor, side: int) -> Tensor:
    """Squares of latents as channels, ordered by row, column, channel."""
    if side == 1:
        return x
    b, c, h, w = x.shape
    squares = x.reshape(b, c, h // side, side, w // side, side).permute(0, 3, 5, 1, 2, 4)
    return squares.reshape(b, side * side * c, h // side, w // side)


def unfolded(x: Tensor, side: int) -> Tensor:
    """The inverse of :func:`folded`."""
    if side == 1:
        return x
    b, values, h, w = x.shape
    squares = x.reshape(b, side, side, values // side**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return squares.reshape(b, values // side**2, h * side, w * side)


def hashed(texts: list[str], max_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Caption tokens without weights: a word is a fixed random vector, with a part for its place."""
    rows_BSD = np.zeros((len(texts), max_tokens, width), dtype=np.float32)
    mask_BS = np.zeros((len(texts), max_tokens), dtype=np.bool_)
    mask_BS[:, :1] = True
    for b, text in enumerate(texts):
        words = re.findall(r"\w+|[^\w\s]", text.lower())[:max_tokens]
        mask_BS[b, : len(words)] = True
        for s, word in enumerate(words):
            rows_BSD[b, s] = word_vector(word, width) + 0.5 * hash_vector(f"place {s}", width)
    return torch.from_numpy(rows_BSD), torch.from_numpy(mask_BS)


@lru_cache(maxsize=8192)
def hash_vector(feature: str, width: int) -> Any:
    """Random numbers that depend on a text alone."""
    digest = hashlib.blake2b(feature.encode("utf-8", "replace"), digest_size=4).digest()
    return np.random.RandomState(int.from_bytes(digest, "little")).standard_normal(width)


def word_vector(word: str, width: int) -> Any:
    """Half the whole word, half its character trigrams."""
    padded = f"^{word[:64]}$"
    trigrams = [padded[i : i + 3] for i in range(len(padded) - 2)]
    spelling = np.sum([hash_vector(f"trigram {t}", width) for t in trigrams], axis=0) / len(trigrams) ** 0.5
    return 0.375**0.5 * (hash_vector(f"word {word}", width) + spelling)
