"""The demo: train from nothing, draw, measure, report. ``make demo`` runs this."""

from __future__ import annotations

import json
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from shoestring import __version__
from shoestring.config import RunConfig, load_yaml, to_yaml
from shoestring.data.oracle import satisfies
from shoestring.data.shapes import single_shape_prompts
from shoestring.data.sources import Splits
from shoestring.encoders.image import build_codec
from shoestring.evaluation.distances import frechet_distance, kernel_distance
from shoestring.evaluation.features import EfficientNetLite0Features
from shoestring.evaluation.retrieval import near_copy_mask, retrieval_of_folder
from shoestring.evaluation.uncertainty import wilson_interval
from shoestring.models.files import build_network
from shoestring.models.transformer import parameter_counts
from shoestring.runtime import pick_device, write_text
from shoestring.sampling.generate import (
    PNG_KEY,
    Pipeline,
    batches,
    load_pipeline,
    picture_grid,
    read_pixels,
    save_png,
    to_pil,
)
from shoestring.studies.report import ReportData, write_report
from shoestring.training.display import read_log
from shoestring.training.folder import checkpoint_folders
from shoestring.training.loop import train
from shoestring.training.stage_data import real_pictures

SEEDS = (1, 2)
"""The two fixed seeds of the retrieval measure."""
BATCH = 100
MEASURED_CAPTIONS = 2000
"""Of larger collections, the first so many captions are drawn and measured."""
SHAPES_PER_PROMPT = 4
GRID_SEEN, GRID_UNSEEN = 24, 8


@dataclass(frozen=True)
class Drawn:
    """Pictures that were drawn, with what was asked for."""

    prompts: tuple[str, ...]
    pictures: Tensor


def draw_to_folder(
    pipeline: Pipeline, folder: Path, prompts: Sequence[str], seeds: Sequence[int], label: str
) -> Drawn:
    """Draw every prompt with every seed into PNGs; pictures that are there already are kept.

    Args:
        pipeline: the model.
        folder: where the PNGs go, named by seed and number, with the prompt in their metadata.
        prompts: captions.
        seeds: one picture of every caption each.
        label: shown beside the progress bar.

    Returns:
        All pictures, seed by seed.
    """
    sampling = pipeline.config.sampling
    jobs = [(seed, part) for seed in seeds for part in batches(len(prompts), BATCH)]
    for seed, part in track(jobs, description=label, console=Console(stderr=True), transient=True):
        paths = [folder / f"{seed:02d}-{i:05d}.png" for i in part]
        parameters = [
            {
                "prompt": prompts[i],
                "seed": seed,
                "index": i,
                "nimg": pipeline.nimg,
                **sampling.model_dump(mode="json"),
            }
            for i in part
        ]
        if all(_is_drawn(p, q) for p, q in zip(paths, parameters, strict=True)):
            continue
        pictures = pipeline.draw([prompts[i] for i in part], seed, part, sampling)
        for path, parameter, picture in zip(paths, parameters, pictures, strict=True):
            save_png(path, to_pil(picture), parameter)
    files = [folder / f"{seed:02d}-{i:05d}.png" for seed in seeds for i in range(len(prompts))]
    return Drawn(tuple(prompts) * len(seeds), torch.stack([read_pixels(file) for file in files]))


def _is_drawn(path: Path, parameters: dict[str, Any]) -> bool:
    """Whether the file is the picture of these very parameters."""
    if not path.exists():
        return False
    with Image.open(path) as picture:
        return picture.info.get(PNG_KEY) == json.dumps(parameters)


def feature_metrics(splits: Splits, drawn: Drawn, samples: Path) -> dict[str, float]:
    """Retrieval over all training captions; Fréchet and kernel distance to held-out pictures.

    The distances compare pictures of as many training captions as there are held-out pictures; the floor
    compares the real pictures of the very same captions with the held-out ones.

    Args:
        splits: real pictures.
        drawn: the pictures in ``samples``, all training captions of the first seed first.
        samples: folder that the retrieval measure is computed from.

    Returns:
        Flat metrics.
    """
    extractor = EfficientNetLite0Features()
    trained, held = splits.train, splits.held_out
    metrics = retrieval_of_folder(samples, trained.images, trained.captions, extractor).metrics()
    captions = list(dict.fromkeys(trained.captions))
    n = min(len(held), len(captions))
    if n < 2:
        return metrics
    first = [trained.captions.index(caption) for caption in captions[:n]]
    real = extractor(trained.images[first])
    never = extractor(held.images[:n])
    made = extractor(drawn.pictures[:n])
    kid, floor = kernel_distance(made, never), kernel_distance(real, never)
    return metrics | {
        "fd_n": n,
        "fd_efflite0": frechet_distance(made, never),
        "fd_efflite0_floor": frechet_distance(real, never),
        "kid_efflite0": kid.mean,
        "kid_efflite0_std": kid.std,
        "kid_efflite0_floor": floor.mean,
        "held_out_n": len(held),
        "near_copies_held_out": int(near_copy_mask(held.images, trained.images).sum()),
    }


def oracle_metrics(pipeline: Pipeline, folder: Path, held_out: float) -> dict[str, float]:
    """Single-shape prompts judged by the oracle: shape and colour both right.

    Args:
        pipeline: a model trained on ``shapes``.
        folder: where the pictures go.
        held_out: share of combinations never trained on.

    Returns:
        Accuracy with its 95 % interval over pictures, for trained and for held-out combinations.
    """
    metrics: dict[str, float] = {}
    for name, prompts in zip(("trained", "held_out"), single_shape_prompts(held_out), strict=True):
        if not prompts:
            continue
        seeds = [SEEDS[0] + i for i in range(SHAPES_PER_PROMPT)]
        drawn = draw_to_folder(pipeline, folder / name, prompts, seeds, f"Drawing {name} combinations")
        verdicts = [satisfies(p, prompt) for p, prompt in zip(drawn.pictures, drawn.prompts, strict=True)]
        right = sum(v.shape and v.colour for v in verdicts)
        low, high = wilson_interval(right, len(verdicts))
        metrics |= {
            f"oracle_single_{name}": right / len(verdicts),
            f"oracle_single_{name}_low95": low,
            f"oracle_single_{name}_high95": high,
            f"oracle_single_{name}_count_too": sum(v.all for v in verdicts) / len(verdicts),
            f"oracle_single_{name}_n": len(verdicts),
        }
    return metrics


def _spread(captions: Sequence[str], count: int) -> list[str]:
    """``count`` captions evenly over the list."""
    captions = list(dict.fromkeys(captions))
    count = min(count, len(captions))
    return [captions[i * len(captions) // count] for i in range(count)]


def _training_facts(log: Sequence[dict[str, Any]]) -> dict[str, float]:
    rows = [row for row in log if row["kind"] == "train"]
    rates = sorted(row["images_per_s"] for row in rows)
    shares = sorted(row["peak_share"] for row in rows)
    return {
        "images_per_s": rates[len(rates) // 2],
        "peak_share": shares[len(shares) // 2],
        "train_s": rows[-1]["elapsed_s"],
        "cost_usd": rows[-1]["cost_usd"],
        "images_seen": rows[-1]["nimg"],
    }


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in 10^9 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _trained_s(folder: Path) -> float:
    """Seconds of training in earlier sittings, by the log."""
    return max((row["elapsed_s"] for row in read_log(folder) if row["kind"] == "train"), default=0.0)


def _parameters(config: RunConfig) -> int:
    with torch.device("meta"):
        return parameter_counts(build_network(config))[0]


def _machine(config: RunConfig, device: torch.device) -> dict[str, str]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.machine()}, {platform.system()}, device {device}",
        "threads": str(torch.get_num_threads()),
        "torch": str(torch.__version__),
        "seed": str(config.seed),
        "commit": _commit(),
    }


def run_demo(config: RunConfig, folder: Path, console: Console) -> bool:
    """Train, draw, measure, report; interrupted at any point, the same call goes on.

    Args:
        config: a recipe.
        folder: run folder; ``report.html`` and ``metrics.json`` appear there.
        console: where a person reads.

    Returns:
        True when the report is written, False if training was interrupted.
    """
    start_s, trained_before_s = time.perf_counter(), _trained_s(folder)
    if not train(config, folder, console):
        return False
    device = pick_device(config.device)
    checkpoint = checkpoint_folders(folder)[-1]
    pipeline = load_pipeline(checkpoint, device)
    splits = real_pictures(config, config.stages[-1], pipeline.codec, folder)
    captions = tuple(dict.fromkeys(splits.train.captions))[:MEASURED_CAPTIONS]
    log = read_log(folder)
    metrics: dict[str, float] = {
        "parameters": _parameters(config),
        "training_captions": len(captions),
        **_training_facts(log),
    }
    if config.data.source == "shapes":
        metrics |= oracle_metrics(pipeline, folder / "samples", config.data.held_out)
    else:
        drawn = draw_to_folder(pipeline, folder / "samples", captions, SEEDS, "Drawing all captions")
        with console.status("Measuring"):
            metrics |= feature_metrics(splits, drawn, folder / "samples")
    seen = _spread(captions, GRID_SEEN)
    unseen = _spread(splits.held_out.captions, GRID_UNSEEN)
    shown = draw_to_folder(pipeline, folder / "grid", seen + unseen, SEEDS[:1], "Drawing the grid")
    zoom = max(1, 64 // pipeline.resolution)
    save_png(
        folder / "grid.png",
        picture_grid(shown.pictures, columns=8, zoom=zoom),
        {"prompts": seen + unseen, "seed": SEEDS[0], "nimg": pipeline.nimg},
    )
    # Time of this sitting, plus the training of earlier ones if there was an interruption.
    metrics["total_s"] = time.perf_counter() - start_s + trained_before_s
    metrics["peak_memory_gb"] = peak_memory_gb()
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    report = write_report(folder, _report_data(config, folder, pipeline, splits, shown, len(seen), metrics))
    console.print(
        f'Report: {report}. A picture of your own words: shoestring sample {folder} --prompt "{captions[0]}"',
        highlight=False,
        soft_wrap=True,
    )
    return True


def _sample_command(folder: Path, caption: str) -> str:
    return f"shoestring sample {shlex.quote(str(folder))} --prompt {shlex.quote(caption)}"


def _commit() -> str:
    """The commit of a source checkout, with a mark if it was changed since; of a wheel, the version."""
    root = Path(__file__).resolve().parents[3]
    try:
        found = subprocess.run(  # noqa: S603
            ["git", "-C", str(root), "describe", "--always", "--dirty"],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"
    return found.stdout.strip()


def _report_data(
    config: RunConfig,
    folder: Path,
    pipeline: Pipeline,
    splits: Splits,
    shown: Drawn,
    seen: int,
    metrics: dict[str, float],
) -> ReportData:
    frames = sorted((folder / "progress").glob("*.png"))
    history = [(int(frame.stem), Image.open(frame).convert("RGB")) for frame in frames]
    with Image.open(frames[-1]) as last:
        history_captions = json.loads(last.info[PNG_KEY])["prompts"]
    pictures = [
        (p, to_pil(x), i < seen) for i, (p, x) in enumerate(zip(shown.prompts, shown.pictures, strict=True))
    ]
    return ReportData(
        title=f"shoestring: {config.name}",
        summary=(
            f"A text-to-image diffusion transformer of {metrics['parameters'] / 1e6:.1f} million parameters, "
            f"trained from nothing on {len(splits.train):,} captioned pictures "
            f"({config.data.source}, {pipeline.resolution} x {pipeline.resolution} pixels)."
        ),
        prompts=pictures,
        sample_command=_sample_command(folder, shown.prompts[0]),
        train_command=f"shoestring train {config.name} data.source=folder data.path=my_pics",
        config_yaml=to_yaml(config),
        log=read_log(folder),
        metrics=metrics,
        history=history,
        history_captions=history_captions,
        machine=_machine(config, pipeline.device),
        credit=splits.credit,
    )


def quick(config: RunConfig) -> RunConfig:
    """The same demo in seconds: every part runs, nothing is learned.

    Args:
        config: a recipe.

    Returns:
        The recipe with few images, few captions, few sampling steps and no waiting between looks.
    """
    data = config.data.model_copy(update={"max_captions": 24})
    stages = tuple(
        stage.model_copy(update={"nimg": 4 * 16, "batch": 16, "micro_batch": None, "warmup_nimg": 0})
        for stage in config.stages
    )
    often = {"log_nimg": 16, "validate_nimg": 64, "sample_nimg": 64, "checkpoint_nimg": 64}
    return config.model_copy(
        update={
            "name": f"{config.name}-quick",
            "data": data,
            "stages": stages,
            "sampling": config.sampling.model_copy(update={"steps": 2}),
            "logging": config.logging.model_copy(update=often | {"validation_images": 16}),
        }
    )


def recompute_retrieval(run: Path, samples: Path) -> dict[str, float]:
    """The retrieval measure of a finished demo, from its pictures alone.

    Args:
        run: run folder, whose ``config.yaml`` says what the training pictures were.
        samples: PNGs with their captions in the metadata.

    Returns:
        The retrieval entries of ``metrics.json``.

    Raises:
        UserError: if there is no run or no picture.
    """
    config = load_yaml(run / "config.yaml")
    codec = build_codec(config.data)
    trained = real_pictures(config, config.stages[-1], codec, run).train
    return retrieval_of_folder(
        samples, trained.images, trained.captions, EfficientNetLite0Features()
    ).metrics()
