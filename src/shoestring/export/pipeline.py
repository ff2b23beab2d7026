"""A folder that ``DiffusionPipeline.from_pretrained`` reads, without shoestring.

Transformers come with their code (``remote/``), U-Nets are diffusers' own. Where all parts of a model are
those of Stable Diffusion, the folder is one of Stable Diffusion, without any code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoestring.config import RunConfig, SamplingConfig, TransformerConfig, UNetConfig
from shoestring.encoders.autoencoders import LatentCodec
from shoestring.encoders.image import build_codec
from shoestring.encoders.taef2 import Taef2Codec
from shoestring.encoders.text import build_text_encoder
from shoestring.encoders.towers import TextTower
from shoestring.encoders.weights import quiet
from shoestring.export.card import model_card
from shoestring.export.place import whole_folder
from shoestring.export.source import Source
from shoestring.interfaces import ImageCodec, TextEncoder
from shoestring.models.layers import ClassEmbedding
from shoestring.models.moe import ExpertChoice
from shoestring.models.transformer import DiffusionTransformer
from shoestring.models.unet import UNet
from shoestring.runtime import PRECISIONS, UserError, write_text

REMOTE = Path(__file__).parent / "remote"
Index = dict[str, Any]


def require_diffusers() -> None:
    """Refuse where the packages of this format are missing."""
    try:
        import diffusers
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"exporting to diffusers needs the package {error.name}; run: pip install 'shoestring[export]'"
        ) from error
    del diffusers


# --------------------------------------------------------------------------------------- the network


def _sizes(blocks: Sequence[nn.Module]) -> list[list[Any]]:
    """What the exported network is told of its blocks: widths of attention and feed-forward, experts."""
    found: list[list[Any]] = []
    for block in blocks:
        mlp: Any = block.mlp
        if isinstance(mlp, ExpertChoice):
            hidden = mlp.w1.shape[2]
        else:
            hidden = (mlp.w1 if hasattr(mlp, "w1") else mlp.fc1).out_features
        attention: Any = block.attn
        found.append([attention.proj.in_features, hidden, isinstance(mlp, ExpertChoice)])
    return found


def transformer_config(network: DiffusionTransformer) -> dict[str, Any]:
    """The arguments of ``remote/shoestring_transformer.py`` that make the same network.

    Args:
        network: a trained one.

    Returns:
        Plain values.

    Raises:
        UserError: if it has a part that the exported code lacks.
    """
    model = network.config
    if model.image_channels:
        raise UserError(
            "the model enlarges pictures (model.image_channels is set), and the exported code draws from "
            "words only; export its base, or use --to file"
        )
    routing: Any = network.routing
    table = network.pos_embed
    return {
        "kind": model.kind,
        "in_channels": model.in_channels,
        "patch_size": model.patch_size,
        "condition": model.condition,
        "dim": model.dim,
        "head_dim": model.head_dim,
        "block_sizes": _sizes(list(network.blocks)),
        "caption_dim": model.caption_dim,
        "caption_hidden": network.y_emb_preprocess.mlp.w1.out_features if model.condition == "text" else 0,
        "classes": model.classes if model.condition == "class" else 0,
        "mixer_dim": model.mixer.dim if model.mixer.depth else 0,
        "mixer_sizes": _sizes(list(network.patch_mixer)),
        "decoder_dim": model.decoder.dim if model.decoder.depth else 0,
        "decoder_head_dim": model.decoder.head_dim if model.decoder.depth else 0,
        "decoder_sizes": _sizes(list(network.decoder_blocks)),
        "experts": model.experts.count,
        "expert_capacity": model.experts.capacity,
        "bias": model.bias,
        "qk_norm": model.qk_norm,
        "norm_eps": model.norm_eps,
        "mask_captions": model.mask_captions,
        "position_scale": network.position_scale,
        "table_side": 0 if table is None else round(table.shape[1] ** 0.5),
        "guidance_input": model.guidance_input,
        "fusion": [routing.first, routing.last] if hasattr(routing, "fusion") else None,
    }


def plain_transformer(network: DiffusionTransformer) -> nn.Module:
    """The network as the exported code has it, with the same weights.

    Args:
        network: a trained one.

    Returns:
        A ``ShoestringTransformer``.

    Raises:
        UserError: if it has a part that the exported code lacks.
    """
    from shoestring.export.remote.shoestring_transformer import ShoestringTransformer

    values = transformer_config(network)
    made: nn.Module = ShoestringTransformer(**values)
    tensors = {n: t for n, t in network.state_dict().items() if not n.endswith("mask_token")}
    if values["table_side"] and network.config.decoder.depth and network.decoder_pos_embed is None:
        tensors["decoder_pos_embed"] = made.decoder_pos_embed
    made.load_state_dict(tensors)
    return made.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------- the process


def check_sampling(sampling: SamplingConfig) -> None:
    """Refuse guidance by left-out tokens, which the exported code does not know."""
    if sampling.weak != "condition" or sampling.strong_ratio > 0:
        raise UserError(
            f"sampling.weak is {sampling.weak} and sampling.strong_ratio {sampling.strong_ratio:g}, but the "
            "exported code sees all tokens; export with sampling.weak=condition sampling.strong_ratio=0"
        )


def scheduler_config(config: RunConfig, sigma_data: float) -> dict[str, Any]:
    """The arguments of ``remote/shoestring_scheduler.py``: process, grid and sampler.

    Args:
        config: of the run.
        sigma_data: of its latents.

    Returns:
        Plain values.
    """
    process, sampling = config.process, config.sampling
    return {
        "process": process.kind,
        "sigma_data": process.sigma_data if process.sigma_data is not None else sigma_data,
        "flow_shift": process.flow_shift,
        "prediction": process.prediction,
        "noise_schedule": process.schedule,
        "num_train_timesteps": process.timesteps,
        "zero_terminal_snr": process.zero_terminal_snr,
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "eta": sampling.eta,
        "spacing": sampling.spacing,
        "sigma_min": sampling.sigma_min,
        "sigma_max": sampling.sigma_max,
        "rho": sampling.rho,
        "sigmas": None if sampling.sigmas is None else list(sampling.sigmas),
    }


def ddim_scheduler(config: RunConfig) -> Any:
    """Diffusers' own scheduler that does the same as ours with sampler euler, for ddpm processes."""
    from diffusers import DDIMScheduler

    process = config.process
    spacing = {"auto": "trailing", "uniform": "linspace"}.get(
        config.sampling.spacing, config.sampling.spacing
    )
    schedule = {"linear": "linear", "scaled-linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
    betas = {"linear": (1e-4, 0.02), "scaled-linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}[
        process.schedule
    ]
    return DDIMScheduler(
        num_train_timesteps=process.timesteps,
        beta_start=betas[0],
        beta_end=betas[1],
        beta_schedule=schedule[process.schedule],
        prediction_type={"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[process.prediction],
        rescale_betas_zero_snr=process.zero_terminal_snr,
        timestep_spacing=spacing if spacing in ("trailing", "leading", "linspace") else "trailing",
        steps_offset=1,
        set_alpha_to_one=True,
        clip_sample=False,
    )


# --------------------------------------------------------------------------------------- the folder


class _Folder:
    """Writes the parts of a pipeline and notes them in its index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: Index = {}

    def code(self, name: str, part: str | None = None) -> None:
        """Copy a file of ``remote``."""
        target = self.folder if part is None else self.folder / part
        target.mkdir(exist_ok=True)
        shutil.copyfile(REMOTE / f"{name}.py", target / f"{name}.py")

    def ours(self, part: str, made: Any, module: str) -> None:
        """A part with code of ours."""
        made.save_pretrained(self.folder / part)
        self.code(module, part)
        self.index[part] = [module, type(made).__name__]

    def theirs(self, part: str, made: Any, library: str) -> None:
        """A part of diffusers or transformers."""
        made.save_pretrained(self.folder / part)
        self.index[part] = [library, type(made).__name__]

    def finish(self, class_name: Any, values: Index) -> None:
        """Write ``model_index.json``."""
        import diffusers

        index = {"_class_name": class_name, "_diffusers_version": diffusers.__version__}
        write_text(self.folder / "model_index.json", json.dumps(index | self.index | values, indent=2) + "\n")


def export_diffusers(source: Source, target: Path, precision: str = "fp32") -> str:
    """Write a pipeline folder.

    Args:
        source: what to export.
        target: folder; see :func:`shoestring.export.place.whole_folder`.
        precision: of the network's weights, fp32 or bf16.

    Returns:
        A sentence on how it is loaded.

    Raises:
        UserError: if the model has a part that has no place there, or packages are missing.
    """
    require_diffusers()
    check_sampling(source.config.sampling)
    if source.config.superres is not None:
        raise UserError(
            f"{source.config.name} enlarges pictures, and pipeline folders draw from words only; export its "
            "base, or use --to file"
        )
    config, codec = source.config, build_codec(source.config.data)
    text = build_text_encoder(config.data) if config.model.condition == "text" else None
    plain = isinstance(source.network, UNet) and _is_stable_diffusion(config, codec)
    about = {"kind": "diffusers", "name": config.name, "images_seen": source.facts.nimg}
    with whole_folder(target, about | {"precision": precision, "plain": plain}) as folder:
        writer = _Folder(folder)
        _write_network(writer, source, PRECISIONS[precision])
        _write_encoders(writer, codec, text, plain)
        if plain:
            _finish_plain(writer, config)
        else:
            _finish_own(writer, source, codec, text)
        write_text(folder / "README.md", model_card(source, "diffusers", plain=plain))
    if plain:
        return f"DiffusionPipeline.from_pretrained({str(target)!r})"
    return f"DiffusionPipeline.from_pretrained({str(target)!r}, trust_remote_code=True)"


def _write_network(writer: _Folder, source: Source, dtype: torch.dtype) -> None:
    if isinstance(source.network, DiffusionTransformer):
        made = plain_transformer(source.network)
        writer.ours("transformer", _cast(made, dtype), "shoestring_transformer")
        return
    assert isinstance(source.network, UNet)
    writer.theirs("unet", _cast(source.network.unet, dtype), "diffusers")
    if isinstance(source.network.y_embedder, ClassEmbedding):
        from shoestring.export.remote.shoestring_class_table import ShoestringClassTable

        weight = source.network.y_embedder.embedding_table.weight
        table = ShoestringClassTable(classes=weight.shape[1], dim=weight.shape[0])
        table.load_state_dict({"rows": weight.t().contiguous()})
        writer.ours("class_table", table, "shoestring_class_table")


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Another precision for all weights; diffusers warns of its own way to do so."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network


def _write_encoders(writer: _Folder, codec: ImageCodec, text: TextEncoder | None, plain: bool) -> None:
    if isinstance(codec, Taef2Codec):
        from shoestring.export.remote.shoestring_taef2 import ShoestringTaef2

        decoder = ShoestringTaef2()
        decoder.decoder.load_state_dict(codec.network.decoder.float().state_dict())
        writer.ours("vae", decoder, "shoestring_taef2")
    elif isinstance(codec, LatentCodec):
        writer.theirs("vae", codec.network, "diffusers")
    if isinstance(text, TextTower):
        tokenizer = text.tokenizer
        if plain:  # the pipeline of Stable Diffusion pads by itself, and as far as the tokenizer says
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
            tokenizer.model_max_length = text.max_tokens
        with quiet("transformers"):
            writer.theirs("text_encoder", text.network, "transformers")
            writer.theirs("tokenizer", tokenizer, "transformers")


def _finish_own(writer: _Folder, source: Source, codec: ImageCodec, text: TextEncoder | None) -> None:
    from shoestring.export.remote.pipeline import ShoestringPipeline
    from shoestring.export.remote.shoestring_scheduler import ShoestringScheduler

    config, model = source.config, source.config.model
    scheduler = ShoestringScheduler(**scheduler_config(config, source.facts.sigma_data))
    writer.ours("scheduler", scheduler, "shoestring_scheduler")
    if isinstance(model, UNetConfig) and config.process.kind == "ddpm":
        ddim_scheduler(config).save_pretrained(writer.folder / "ddim_scheduler")
    interval = config.sampling.guidance_interval
    for part in ShoestringPipeline._optional_components:
        writer.index.setdefault(part, [None, None])
    writer.code("pipeline")
    writer.finish(
        ["pipeline", "ShoestringPipeline"],
        {
            "condition": model.condition,
            "text": config.data.text_encoder,
            "text_width": 0 if text is None else text.width,
            "max_tokens": config.data.max_tokens,
            "mask_captions": model.mask_captions,
            "text_dtype": config.data.text_encoder_dtype,
            "vae_dtype": config.data.codec_dtype,
            "precision": config.precision,
            "guidance_scale": config.sampling.guidance,
            "guidance_interval": None if interval is None else list(interval),
            "resolution": source.facts.resolution,
            "channels": codec.channels,
            "downsampling": codec.downsampling,
            "fold": 1 if isinstance(model, TransformerConfig) else model.patch_size,
            "classes": model.classes if model.condition == "class" else 0,
            "class_names": list(source.facts.classes),
        },
    )


def _is_stable_diffusion(config: RunConfig, codec: ImageCodec) -> bool:
    """Whether every part is one of Stable Diffusion, so that no code is needed."""
    model, process, sampling = config.model, config.process, config.sampling
    return (
        isinstance(codec, LatentCodec)
        and codec.name == "autoencoder-kl"
        and codec.shift_and_scale[0] == [0.0]
        and len(codec.shift_and_scale[1]) == 1
        and model.condition == "text"
        and not model.mask_captions
        and model.patch_size == 1
        and config.data.text_encoder == "clip"
        and process.kind == "ddpm"
        and not model.guidance_input
        and (sampling.sampler == "euler" or (sampling.sampler == "ddim" and not sampling.eta))
        and sampling.spacing in ("auto", "trailing", "leading")
    )


def _finish_plain(writer: _Folder, config: RunConfig) -> None:
    """A folder of ``StableDiffusionPipeline``."""
    writer.theirs("scheduler", ddim_scheduler(config), "diffusers")
    none = {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
    writer.finish("StableDiffusionPipeline", none | {"requires_safety_checker": False})
