"""A model card: Markdown with the hub's metadata, filled from what the run has written down.

Nothing is guessed. What a run folder does not tell is said not to be known, and what only the author can know
(the licence of the weights) is marked ``to be filled in``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from shoestring import __version__
from shoestring.config import DataConfig, RunConfig, UNetConfig
from shoestring.evaluation.digests import file_digest
from shoestring.evaluation.measures import HIGHER_IS_BETTER
from shoestring.evaluation.result import read_result
from shoestring.export.source import Source
from shoestring.models.transformer import parameter_counts
from shoestring.runtime import UserError, write_text
from shoestring.training.display import duration, read_log, rows_of

TO_FILL = "to be filled in"
LIBRARIES = {"diffusers": "diffusers", "onnx": "onnx"}
"""Of the hub; others are shoestring's own."""
HUB_DATA = {"cifar10": "uoft-cs/cifar10"}
"""Sources that have a name on the hub."""
DATA = {
    "openmoji": "OpenMoji pictures and their names (openmoji.org, licence CC BY-SA 4.0)",
    "shapes": "coloured shapes with captions, drawn by shoestring",
    "cifar10": "CIFAR-10 (which has no formal licence)",
    "folder": "pictures of a folder",
    "store": "latents of prepared stores",
}
USE = {
    "file": '```sh\nshoestring sample {file} --prompt "..."\n```',
    "onnx": (
        "`model.onnx` estimates the clean latents from `xt`, `alpha` and `sigma` (xt = alpha x0 + sigma "
        "noise) and the condition; names, types and shapes are in `shoestring.json`. The sampler is yours."
    ),
    "torch": (
        '`torch.export.load("model.pt2").module()` estimates the clean latents from `xt`, `alpha` and '
        "`sigma` (xt = alpha x0 + sigma noise) and the condition; see `shoestring.json`."
    ),
    "released": "The weights are in the layout of the released {family} code; its tools read them.",
}
DIFFUSERS = """```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH-OR-REPOSITORY"{remote})
pipeline({prompt}, generator=torch.Generator().manual_seed(0)).images[0].save("picture.png")
```"""


def model_card(source: Source, kind: str, plain: bool = False) -> str:
    """The card.

    Args:
        source: what is exported.
        kind: as what: file, diffusers, onnx, torch, released or card.
        plain: of diffusers: whether no code of ours is needed.

    Returns:
        Markdown, with metadata of the hub in front.
    """
    results, others = _results(source)
    config = source.config
    parts = [
        f"---\n{yaml.safe_dump(_metadata(source, kind, results), sort_keys=False, allow_unicode=True)}---",
        f"# {config.name}",
        f"An image diffusion model, trained with shoestring {__version__}: {_in_words(config)}, "
        f"for pictures of {source.facts.resolution} x {source.facts.resolution} pixels.",
        f"## Use\n\n{_use(source, kind, plain)}",
        f"## Model\n\n{_table(_model_rows(source))}",
        f"## Training\n\n{_stages(config)}\n\n{_table(_training_rows(source))}",
        f"## Data\n\n{_data(config.data)}",
        f"## Figures\n\n{_figures(results, others)}",
        f"## Licence\n\n{_licence(config)}",
        f"## Limits\n\n{_limits(source)}",
    ]
    return "\n\n".join(parts) + "\n"


def export_card(source: Source, target: Path) -> str:
    """Write the card alone.

    Args:
        source: whose card.
        target: ends in .md; a file that is there is kept.

    Returns:
        A sentence on what is left to do.

    Raises:
        UserError: if something is there already, which may have been filled in by hand.
    """
    if target.suffix != ".md":
        raise UserError(f"--out is {target}; a card ends in .md")
    if target.exists():
        raise UserError(f"{target} exists and may have been filled in by hand; choose another --out")
    write_text(target, model_card(source, "card"))
    return f"fill in what is marked '{TO_FILL}'"


def _metadata(source: Source, kind: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    config = source.config
    task = "text-to-image" if config.model.condition == "text" else "unconditional-image-generation"
    task = "image-to-image" if config.superres is not None else task
    found: dict[str, Any] = {
        "license": "other",
        "license_name": TO_FILL.replace(" ", "-"),
        "library_name": LIBRARIES.get(kind, "shoestring"),
        "pipeline_tag": task,
        "tags": ["shoestring", "diffusion", config.model.kind, config.process.kind],
    }
    if config.data.source in HUB_DATA:
        found["datasets"] = [HUB_DATA[config.data.source]]
    figures = [
        {
            "task": {"type": task},
            "dataset": {
                "type": HUB_DATA.get(config.data.source, config.data.source),
                "name": f"{config.data.source}, protocol {result['protocol']['name']}",
            },
            "metrics": [
                {"type": name, "name": name, "value": float(figure["value"])}
                for name, figure in result["figures"].items()
            ],
        }
        for result in results
        if result["figures"]
    ]
    if figures:
        found["model-index"] = [{"name": config.name, "results": figures}]
    return found


def _in_words(config: RunConfig) -> str:
    condition = {"text": "from captions", "class": "from classes", "none": "without a condition"}
    kind = "a U-Net" if isinstance(config.model, UNetConfig) else f"a transformer ({config.model.kind})"
    return f"{kind} that draws {condition[config.model.condition]}"


def _use(source: Source, kind: str, plain: bool) -> str:
    config = source.config
    if kind == "diffusers":
        prompt = {"text": '"a prompt"', "class": '"0"', "none": '""'}[config.model.condition]
        remote = "" if plain else ", trust_remote_code=True"
        text = DIFFUSERS.format(remote=remote, prompt=prompt)
        if plain:
            return (
                f"{text}\n\nAll parts are those of Stable Diffusion. The network was trained with zeros for "
                "the empty caption: pass `negative_prompt_embeds=torch.zeros_like(prompt_embeds)` to guide "
                "as it was trained. `latents=` are taken as they are, while shoestring scales noise by the "
                "first sigma."
            )
        text += (
            "\n\nThe folder brings its own code, which reads torch, diffusers, transformers and numpy only. "
            "`latents=` takes standard normal noise: from the same noise it draws what `shoestring sample` "
            "draws."
        )
        if isinstance(config.model, UNetConfig):
            text += _unet_use(config.model)
        return text
    if kind == "card":
        kind = "file"
    return USE[kind].format(
        file=source.file.name, family={"microdit": "MicroDiT"}.get(config.model.kind, "MaskDiT")
    )


def _unet_use(model: UNetConfig) -> str:
    text = "\n\n`unet/` is a plain `UNet2DConditionModel` and loads without any code of ours."
    if model.patch_size > 1:
        text += (
            f" It works on squares of {model.patch_size} x {model.patch_size} latents as channels, ordered "
            "by row, column, channel: `folded` and `unfolded` in `pipeline.py`."
        )
    if model.condition != "text":
        text += (
            " Its classes are captions of two tokens, zero and a row of `class_table/` (tensor `rows`); no "
            "class is two zero tokens."
        )
    return text


def _model_rows(source: Source) -> list[tuple[str, str]]:
    config, data = source.config, source.config.data
    total, active = parameter_counts(source.network)
    rows = [
        ("parameters", f"{total:,}" + (f" ({active:,} active a token)" if active != total else "")),
        ("noise process", f"{config.process.kind}, sigma_data {source.facts.sigma_data:.4g}"),
        ("weights", f"{source.facts.weights} (averaged)" if source.facts.weights != "trained" else "trained"),
        ("latents", data.codec + (f" of {_place(data.codec_path)}" if data.codec_path else "")),
    ]
    if config.model.condition == "text":
        where = f" of {_place(data.text_encoder_path)}" if data.text_encoder_path else ""
        rows.append(("captions", f"{data.text_encoder}{where}, {data.max_tokens} tokens"))
    if config.model.condition == "class":
        rows.append(("classes", f"{config.model.classes:,}"))
    if not isinstance(config.model, UNetConfig):
        rows.append(("token method", config.tokens.method))
    sampling = config.sampling
    rows.append(("sampling", f"{sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance:g}"))
    return rows


def _place(path: str) -> str:
    """A hub name as it is; of a folder on somebody's disk the last part only."""
    hub_name = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()
    return path if hub_name else Path(path).name


def _stages(config: RunConfig) -> str:
    rows = [
        "| stage | images | batch | pixels | patches left out | learning rate |",
        "|---|---|---|---|---|---|",
    ]
    for s in config.stages:
        cells = (
            s.name,
            f"{s.steps * s.batch:,}",
            f"{s.batch:,}",
            s.resolution,
            f"{s.mask_ratio:.0%}",
            f"{s.lr:g}",
        )
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([f"Recipe `{config.name}`, seed {config.seed}:\n", *rows])


def _training_rows(source: Source) -> list[tuple[str, str]]:
    facts, config = source.facts, source.config
    log = [] if source.run is None else rows_of(read_log(source.run), "train")
    before = [row for row in log if row["nimg"] <= facts.nimg]
    last = before[-1] if before else {}
    flops, seconds = last.get("training_flops"), last.get("elapsed_s")
    price = config.logging.usd_per_hour
    cost = "not known (logging.usd_per_hour was not set)"
    if seconds is not None and price > 0:
        cost = f"${seconds / 3600 * price:,.2f} at ${price:g} an hour"
    share = f" of {config.nimg:,}; the run is not finished" if facts.nimg < config.nimg else ""
    begin = config.initial_weights
    return [
        ("images seen", f"{facts.nimg:,}{share}"),
        ("begun with", "drawn weights" if begin is None else f"the weights of {_place(begin)}"),
        ("training FLOPs", f"{flops:.3g}" if flops is not None else "not recorded"),
        ("time", duration(seconds) if seconds is not None else "not recorded"),
        ("cost", cost if seconds is not None else "not recorded"),
    ]


def _data(data: DataConfig) -> str:
    named = [data.path] if data.path else [store.path for store in data.stores]
    of = f" ({', '.join(_place(path) for path in named)})" if named and data.source != "cifar10" else ""
    text = f"{DATA[data.source]}{of}. {data.held_out:.1%} were held out of training, by {data.split}."
    if data.source in ("folder", "store"):
        text += f"\n\nOrigin and licence of the pictures: **{TO_FILL}**."
    return text[0].upper() + text[1:]


def _results(source: Source) -> tuple[list[dict[str, Any]], int]:
    """Finished evaluations of this very file, and how many there are of other weights of the run."""
    if source.run is None:
        return [], 0
    found, others, digest = [], 0, None
    for file in sorted((source.run / "eval").glob("*/result.json")):
        try:
            result = read_result(file)
        except UserError:  # not finished, or of another version
            continue
        digest = digest or file_digest(source.file)
        if result.get("model", {}).get("digest") == digest:
            found.append(result)
        else:
            others += 1
    return found, others


def _figures(results: list[dict[str, Any]], others: int) -> str:
    more = f"\n\n{others} more evaluations in the run folder are of other weights." if others else ""
    if not results:
        return f"Not evaluated (`shoestring eval` writes figures that go in here).{more}"
    rows = ["| protocol | pictures | sampling | figure | value |", "|---|---|---|---|---|"]
    for result in results:
        sampling = result["facts"]["sampling"]
        how = f"{sampling['sampler']}, {sampling['steps']} steps, guidance {sampling['guidance']:g}"
        for name, figure in result["figures"].items():
            value = f"{figure['value']:.4g}"
            if "low95" in figure:
                value += f" [{figure['low95']:.4g}, {figure['high95']:.4g}]"
            arrow = " (higher is better)" if name.startswith(HIGHER_IS_BETTER) else ""
            rows.append(
                f"| {result['protocol']['name']} | {result['facts']['pictures']:,} | {how} | {name}{arrow} | "
                f"{value} |"
            )
    return "\n".join(rows) + "\n\nIn brackets: 95 % intervals. Whole protocols: `result.json`." + more


def _licence(config: RunConfig) -> str:
    data = config.data
    lines = [
        f"* Weights: **{TO_FILL}** (`license` and `license_name` in the metadata above).",
        "* Code: Apache-2.0.",
    ]
    if data.codec != "pixels":
        lines.append(f"* Autoencoder ({data.codec}): that of its author.")
    if config.model.condition == "text" and data.text_encoder != "hashing":
        lines.append(f"* Text encoder ({data.text_encoder}): that of its author.")
    return "\n".join(lines)


def _limits(source: Source) -> str:
    config = source.config
    lines = [
        f"* Trained at {source.facts.resolution} pixels; other sides were not trained.",
        "* It knows what its data show, with the biases of its data; nothing filters what it draws.",
        "* Figures hold for their protocol, sampler and guidance only.",
    ]
    if source.facts.nimg < config.nimg:
        lines.insert(0, f"* The run is not finished: {source.facts.nimg:,} of {config.nimg:,} images seen.")
    if config.model.condition == "text":
        lines.append(f"* Captions beyond {config.data.max_tokens} tokens are cut.")
    return "\n".join(lines)


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
