"""Released layouts of MicroDiT and MaskDiT: a model as their code reads it, and their weights as a run."""

from __future__ import annotations

import shutil
from pathlib import Path

from shoestring.config import RunConfig, TransformerConfig, to_yaml
from shoestring.config.data import CODEC_DOWNSAMPLING
from shoestring.export.card import model_card
from shoestring.export.place import whole_folder
from shoestring.export.source import Source
from shoestring.models.files import ModelFacts, save_model
from shoestring.models.released import Part, read_released, write_released
from shoestring.models.transformer import DiffusionTransformer
from shoestring.runtime import UserError, write_text
from shoestring.training.checkpoint import AVERAGE, WEIGHTS

SIGMA_DATA = {"microdit": 0.9, "maskdit": 0.5}
"""What the released models were trained with; their files do not tell."""


def patches_a_side(config: RunConfig, resolution: int) -> int:
    """Side of the grid of patches at a resolution."""
    return resolution // (CODEC_DOWNSAMPLING[config.data.codec] * config.model.patch_size)


def export_released(source: Source, target: Path) -> str:
    """Write weights for the released code.

    Args:
        source: what to export.
        target: a file that ends in .safetensors or .pt, or a folder for ``weights.safetensors`` and a card.

    Returns:
        A sentence on what it is.

    Raises:
        UserError: if there is no released form of the model, or something else is there.
    """
    if not isinstance(source.network, DiffusionTransformer):
        raise UserError(
            "model.kind is unet; only microdit and maskdit have released layouts, so use --to diffusers"
        )
    side = patches_a_side(source.config, source.facts.resolution)
    family = {"microdit": "MicroDiT", "maskdit": "MaskDiT"}[source.network.config.kind]
    if target.suffix in (".safetensors", ".pt"):
        if target.exists():
            raise UserError(f"{target} exists; choose another --out, or delete it")
        write_released(target, source.network, side)
    else:
        about = {"kind": "released", "name": source.config.name, "images_seen": source.facts.nimg}
        with whole_folder(target, about | {"family": family}) as folder:
            write_released(folder / "weights.safetensors", source.network, side)
            write_text(folder / "README.md", model_card(source, "released"))
    return f"the layout of the released {family}, position tables of {side} x {side} patches"


def import_released(file: Path, config: RunConfig, out: Path, part: Part = "ema") -> str:
    """Make a run of released weights: it can be sampled, evaluated, and begun with.

    Args:
        file: of the released MicroDiT or MaskDiT, .safetensors or a checkpoint of torch.
        config: recipe of the model, its codec and text encoder; the run's settings.
        out: run folder to make; it must not exist.
        part: which weights of a training checkpoint, ``ema`` or ``model``.

    Returns:
        What was found in the file.

    Raises:
        UserError: if the file is not one, does not fit the recipe, or the folder exists.
    """
    model = config.model
    if not isinstance(model, TransformerConfig):
        raise UserError(
            f"--recipe {config.name} has model.kind=unet; released weights are of microdit or maskdit"
        )
    if config.process.kind != "edm":
        raise UserError(
            f"--recipe {config.name} has process.kind={config.process.kind}, but released MicroDiT and "
            "MaskDiT were trained with edm; set process.kind=edm"
        )
    if out.exists():
        raise UserError(f"{out} exists; choose another --out for the imported run, or delete that one")
    network = read_released(file, model, part)
    sigma_data = config.process.sigma_data or SIGMA_DATA[model.kind]
    table = network.pos_embed
    resolution = config.stages[-1].resolution
    if table is not None:
        side = round(table.shape[1] ** 0.5)
        resolution = side * model.patch_size * CODEC_DOWNSAMPLING[config.data.codec]
    config = config.model_copy(
        update={
            "initial_weights": str(file.resolve()),
            "process": config.process.model_copy(update={"sigma_data": sigma_data}),
        }
    )
    weights = "ema" if part == "ema" else "trained"
    # How many images these very weights have seen the file does not say: those of the recipe.
    facts = ModelFacts(config.nimg, weights, sigma_data, network.position_scale, resolution)
    temporary = out.with_name(f".{out.name}.part")
    try:
        place = temporary / "checkpoints" / f"{config.nimg:09d}"
        place.mkdir(parents=True)
        name = AVERAGE if part == "ema" else WEIGHTS
        save_model(place / name, network.state_dict(), config, facts)
        write_text(temporary / "config.yaml", to_yaml(config))
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error}); nothing was made") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return (
        f"{model.kind} at {resolution} pixels, {sum(p.numel() for p in network.parameters()):,} parameters, "
        f"sigma_data {sigma_data:g}"
    )
