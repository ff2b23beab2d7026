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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from shoestring import __version__
from shoestring.config import RunConfig, load_yaml, to_yaml
from shoestring.data.oracle import satisfies
from shoestring.data.shapes import single_shape_prompts
from shoestring.data.sources import Splits
from shoestring.encoders.image import build_codec
from shoestring.evaluation.drawing import draw, pictures_of, wishes
from shoestring.evaluation.features import EfficientNetLite0Features
from shoestring.evaluation.protocol import find_protocol
from shoestring.evaluation.retrieval import retrieval_of_folder
from shoestring.evaluation.uncertainty import wilson_interval
from shoestring.models.files import build_network
from shoestring.models.transformer import parameter_counts
from shoestring.runtime import pick_device, write_text
from shoestring.sampling.generate import PNG_KEY, Pipeline, picture_grid, save_png, to_pil
from shoestring.studies.evaluate import Evaluation, draw_shown
from shoestring.studies.evaluate_figures import evaluate
from shoestring.studies.evaluate_page import write_page
from shoestring.studies.report import ReportData, write_report
from shoestring.training.display import read_log
from shoestring.training.loop import train
from shoestring.training.stage_data import real_pictures

BATCH = 100
GRID_SEED = 1
SHAPES_PER_PROMPT = 4
GRID_SEEN, GRID_UNSEEN = 24, 8


def evaluation_metrics(evaluation: Evaluation, console: Console) -> dict[str, float]:
    """Evaluate by a protocol, and give its figures flat, with the numbers of pictures.

    Args:
        evaluation: by ``demo`` or ``shapes``.
        console: where a person reads.

    Returns:
        Entries of ``metrics.json``.
    """
    result = evaluate(evaluation, console)
    write_page(evaluation, result)
    metrics: dict[str, float] = {}
    for name, figure in result.figures.items():
        parts = {"": figure.value, "_low95": figure.low95, "_high95": figure.high95, "_spread": figure.spread}
        metrics |= {f"{name}{end}": value for end, value in parts.items() if value is not None}
    counts = {
        "retrieval_captions": ("retrieval", "captions"),
        "held_out_n": ("retrieval", "held_out_pictures"),
    }
    counts |= {"fd_reference_n": ("reference", "pictures"), "fd_floor_n": ("floor", "pictures")}
    found = {key: result.facts.get(section, {}).get(name) for key, (section, name) in counts.items()}
    return metrics | {"drawn_n": result.facts["pictures"]} | {k: n for k, n in found.items() if n is not None}


def oracle_metrics(pipeline: Pipeline, folder: Path, held_out: float, console: Console) -> dict[str, float]:
    """Single-shape prompts judged by the oracle: shape and colour both right.

    Args:
        pipeline: a model trained on ``shapes``.
        folder: where the pictures go.
        held_out: share of combinations never trained on.
        console: where a person reads.

    Returns:
        Accuracy with its 95 % interval over prompts, for trained and for held-out combinations.
    """
    metrics: dict[str, float] = {}
    for name, prompts in zip(("trained", "held_out"), single_shape_prompts(held_out), strict=True):
        if not prompts:
            continue
        wanted = wishes(prompts, range(1, 1 + SHAPES_PER_PROMPT))
        draw_shown(pipeline, folder / name, wanted, pipeline.config.sampling, BATCH, console)
        pictures = pictures_of(folder / name, wanted)
        verdicts = [satisfies(p, wish.prompt) for p, wish in zip(pictures, wanted, strict=True)]
        right = sum(v.shape and v.colour for v in verdicts)
        low, high = wilson_interval(right / SHAPES_PER_PROMPT, len(prompts))  # a prompt is one trial
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
    shapes = config.data.source == "shapes"
    protocol = find_protocol("shapes" if shapes else "demo")
    evaluation = Evaluation(folder, protocol, None, pick_device(config.device), console)
    pipeline, splits = evaluation.pipeline, evaluation.splits()
    captions = tuple(dict.fromkeys(splits.train.captions))
    log = read_log(folder)
    metrics: dict[str, float] = {
        "parameters": _parameters(config),
        "training_captions": len(captions),
        **_training_facts(log),
    }
    if shapes:
        metrics |= oracle_metrics(pipeline, folder / "samples", config.data.held_out, console)
    metrics |= evaluation_metrics(evaluation, console)
    seen = _spread(captions, GRID_SEEN)
    unseen = _spread(splits.held_out.captions, GRID_UNSEEN)
    shown = wishes(seen + unseen, (GRID_SEED,))
    draw(pipeline, folder / "grid", shown, config.sampling, len(shown))
    pictures = pictures_of(folder / "grid", shown)
    zoom = max(1, 64 // pipeline.resolution)
    save_png(
        folder / "grid.png",
        picture_grid(pictures, columns=8, zoom=zoom),
        {"prompts": seen + unseen, "seed": GRID_SEED, "nimg": pipeline.nimg},
    )
    # Time of this sitting, plus the training of earlier ones if there was an interruption.
    metrics["total_s"] = time.perf_counter() - start_s + trained_before_s
    metrics["peak_memory_gb"] = peak_memory_gb()
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    samples = [
        (wish.prompt, to_pil(x), wish.number < len(seen)) for wish, x in zip(shown, pictures, strict=True)
    ]
    report = write_report(folder, _report_data(config, folder, pipeline, splits, samples, metrics))
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
    samples: list[tuple[str, Image.Image, bool]],
    metrics: dict[str, float],
) -> ReportData:
    frames = sorted((folder / "progress").glob("*.png"))
    history = [(int(frame.stem), Image.open(frame).convert("RGB")) for frame in frames]
    with Image.open(frames[-1]) as last:
        history_captions = json.loads(last.info[PNG_KEY])["prompts"]
    return ReportData(
        title=f"shoestring: {config.name}",
        summary=(
            f"A text-to-image diffusion transformer of {metrics['parameters'] / 1e6:.1f} million parameters, "
            f"trained from nothing on {len(splits.train):,} captioned pictures "
            f"({config.data.source}, {pipeline.resolution} x {pipeline.resolution} pixels)."
        ),
        prompts=samples,
        sample_command=_sample_command(folder, samples[0][0]),
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
    """The retrieval measure from pictures alone.

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
