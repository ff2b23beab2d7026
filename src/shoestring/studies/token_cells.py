"""The cells of the token-reduction study: what is trained, group by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shoestring.config import (
    ExpertsConfig,
    MixerConfig,
    NoiseConfig,
    ProcessConfig,
    Ramp,
    RunConfig,
    StageConfig,
)
from shoestring.runtime import UserError
from shoestring.studies.token_recipes import (
    LR,
    METHOD_RECIPES,
    Preset,
    training_flops,
    transformer,
    with_model,
    with_stages,
    with_tokens,
)

GUIDANCE = (1.25, 1.5, 2.0, 3.0)
"""Scales measured for the unmask tuning, beside 1."""


@dataclass(frozen=True)
class Cell:
    """One training.

    ``name`` without seed groups the rows of a table; ``group`` is the part of the study it belongs to.
    """

    name: str
    group: str
    method: str
    ratio: float = 0.0
    seed: int = 0
    tail: float = 0.0
    """Share of the images at the end that is trained unmasked, or, for ``tail_cosine``, while unmasking."""
    tail_cosine: bool = False
    change: Callable[[RunConfig], RunConfig] | None = None
    """Whatever else differs from the base recipe."""
    guidance: tuple[float, ...] = ()
    """Guidance scales measured at the end, beside 1."""
    many: bool = False
    """Draw the larger number of samples at the end."""
    share: float = 1.0
    """Images relative to the preset."""

    @property
    def key(self) -> str:
        """Name of the run folder."""
        return f"{self.name}-s{self.seed}"


def configure(cell: Cell, base: RunConfig) -> RunConfig:
    """The complete recipe of a cell.

    Args:
        cell: what differs.
        base: see :func:`base_recipe`.

    Returns:
        A recipe that ``shoestring train`` can run as well.
    """
    config = METHOD_RECIPES[cell.method](base, cell.ratio)
    config = config.model_copy(update={"name": cell.key, "seed": cell.seed})
    if cell.change is not None:
        config = cell.change(config)
    if cell.tail:
        config = config.model_copy(update={"stages": _with_tail(config.stages[0], cell)})
    if cell.tail_cosine:  # every ratio on the way would be compiled anew
        config = config.model_copy(update={"compile": False})
    return config


def _with_tail(stage: StageConfig, cell: Cell) -> tuple[StageConfig, StageConfig]:
    """The last share of the images unmasked, or along a cosine to the power of four down to zero."""
    steps = max(1, round(stage.steps * cell.tail))
    first = stage.model_copy(update={"nimg": (stage.steps - steps) * stage.batch})
    # The average starts anew: measured weights are averages, and half of a short tail's would be masked ones.
    last = {"name": "tail", "nimg": steps * stage.batch, "warmup_nimg": 0, "mask_ratio": 0.0}
    last |= {"ema_start_nimg": stage.batch}
    if cell.tail_cosine:
        last |= {"mask_ratio": stage.mask_ratio, "mask_ratio_end": 0.0, "mask_schedule": "cosine"}
    return first, stage.model_copy(update=last)


def _layer_wise(config: RunConfig) -> RunConfig:
    """Widths that grow from block to block, at the FLOPs of the constant ones (within 2 %)."""
    target = training_flops(config, config.stages[0])
    best: tuple[float, RunConfig] | None = None
    for quarter in range(8, 49):
        ramp = with_model(
            config,
            qkv_multipliers=Ramp(first=0.5, last=1.0),
            ffn_multipliers=Ramp(first=0.5, last=quarter / 4),
        )
        off = abs(training_flops(ramp, ramp.stages[0]) / target - 1)
        if best is None or off < best[0]:
            best = off, ramp
    assert best is not None
    return best[1]


def _experts(config: RunConfig) -> RunConfig:
    """Eight experts in every second block, in the mixer too, each as wide as 4 times the block.

    That is not at equal FLOPs: an expert layer of capacity 2 costs more than the feed-forward it replaces.
    """
    return with_model(config, experts=ExpertsConfig(count=8, capacity=2.0, every=2))


def _seeds(cell: Cell, count: int = 3) -> list[Cell]:
    return [replace(cell, seed=seed, many=True) for seed in range(count)]


def core_cells() -> list[Cell]:
    """The main comparison; the cells that answer most come first."""
    cells = [
        Cell("dense", "core", "dense", many=True),
        Cell("deferred-0.75", "core", "deferred", 0.75, many=True, guidance=GUIDANCE),
        Cell("naive-0.75", "core", "naive", 0.75, many=True),
    ]
    cells += [
        Cell("large-patch", "core", "large-patch", many=True),
        Cell("maskdit-0.75", "core", "maskdit", 0.75),
        Cell("small-model-0.75", "core", "small-model", 0.75),
        Cell("tread-0.5", "core", "tread", 0.5),
        Cell("sprint-0.75", "core", "sprint", 0.75),
        Cell("deferred-0.75-tail10", "core", "deferred", 0.75, tail=0.1),
        Cell("naive-0.75-tail10", "core", "naive", 0.75, tail=0.1),
        Cell("sprint-0.75-tail10", "core", "sprint", 0.75, tail=0.1),
    ]
    for ratio in (0.5, 0.875):
        cells += [
            Cell(f"{method}-{ratio:g}", "core", method, ratio)
            for method in ("deferred", "naive", "maskdit", "small-model")
        ]
    for seed in (1, 2):
        cells += [replace(cell, seed=seed, guidance=()) for cell in cells[:4]]
    return cells


def ablation_cells() -> list[Cell]:
    """The papers' other ablations."""
    wide = Cell("naive-0.75-layer-wise", "ablations", "naive", 0.75, change=_layer_wise)
    moe = Cell("deferred-0.75-experts", "ablations", "deferred", 0.75, change=_experts)
    cells = [*_seeds(wide), *_seeds(moe)]
    for depth in (2, 6):

        def mixer(config: RunConfig, depth: int = depth) -> RunConfig:
            return with_model(config, mixer=MixerConfig(depth=depth, dim=transformer(config).mixer.dim))

        cells.append(Cell(f"deferred-0.75-mixer{depth}", "ablations", "deferred", 0.75, change=mixer))
    cells.append(
        Cell(
            "deferred-0.75-blocks",
            "ablations",
            "deferred",
            0.75,
            change=lambda config: with_tokens(config, pattern="blocks"),
        )
    )
    for coefficient in (0.0, 0.05, 0.5):

        def mae(config: RunConfig, coefficient: float = coefficient) -> RunConfig:
            return with_tokens(config, reconstruction=coefficient)

        cells.append(Cell(f"maskdit-0.75-mae{coefficient:g}", "ablations", "maskdit", 0.75, change=mae))
    for share in (0.01, 0.025, 0.05):
        for cosine in (False, True):
            name = f"deferred-0.75-{'cosine' if cosine else 'tail'}{100 * share:g}"
            cells.append(
                Cell(name, "tuning", "deferred", 0.75, tail=share, tail_cosine=cosine, guidance=GUIDANCE)
            )
    for name, ratio in (("dense", 0.0), ("deferred", 0.75)):
        cells.append(
            Cell(f"{name}{f'-{ratio:g}' if ratio else ''}-flow", "ablations", name, ratio, change=_flow)
        )
    return cells


def _flow(config: RunConfig) -> RunConfig:
    config = config.model_copy(update={"process": ProcessConfig(kind="flow")})
    return with_stages(config, noise=NoiseConfig(mean=0.0, std=1.0))


def long_cells() -> list[Cell]:
    """Where dropping should pay: 1,024 tokens (patch 1)."""

    def fine(config: RunConfig) -> RunConfig:
        return with_model(config, patch_size=1)

    methods = (("dense", 0.0, 0.0), ("deferred", 0.75, 0.0), ("tread", 0.5, 0.0), ("sprint", 0.75, 0.0))
    return [
        Cell(
            f"{m}{f'-{r:g}' if r else ''}{'-tail10' if tail else ''}-1024",
            "long",
            m,
            r,
            tail=tail,
            change=fine,
            share=1 / 3,
        )
        for m, r, tail in (*methods, ("sprint", 0.75, 0.1))
    ]


def check_cells() -> list[Cell]:
    """Half and twice the learning rate for the sides of the comparisons that go against the paper."""
    cells = []
    sides = (
        ("deferred-0.75", "deferred", 0.75),
        ("small-model-0.75", "small-model", 0.75),
        ("dense", "dense", 0.0),
    )
    for name, method, ratio in sides:
        for factor in (0.5, 2.0):

            def scaled(config: RunConfig, factor: float = factor) -> RunConfig:
                return with_stages(config, lr=LR * factor)

            cells.append(Cell(f"{name}-lr{factor:g}", "checks", method, ratio, change=scaled))
    return cells


def tiny_cells() -> list[Cell]:
    """A first answer on a laptop: every method once."""
    return [
        Cell("dense", "core", "dense"),
        Cell("deferred-0.75", "core", "deferred", 0.75),
        Cell("naive-0.75", "core", "naive", 0.75),
        Cell("maskdit-0.5", "core", "maskdit", 0.5),
        Cell("tread-0.5", "core", "tread", 0.5),
        Cell("sprint-0.75", "core", "sprint", 0.75),
        Cell("large-patch", "core", "large-patch"),
        Cell("small-model-0.75", "core", "small-model", 0.75),
    ]


GROUPS: dict[str, Callable[[], list[Cell]]] = {
    "core": core_cells,
    "ablations": ablation_cells,
    "long": long_cells,
    "checks": check_cells,
}


def choose_cells(preset: Preset, wanted: Sequence[str]) -> list[Cell]:
    """The cells of a study.

    Args:
        preset: size of the study.
        wanted: groups or names of cells; none = all.

    Returns:
        The cells in the order in which they are run.

    Raises:
        UserError: if a name is unknown.
    """
    everything = tiny_cells() if preset.name == "tiny" else [c for make in GROUPS.values() for c in make()]
    if not wanted:
        return everything
    known = {cell.group for cell in everything} | {cell.name for cell in everything}
    for name in wanted:
        if name not in known:
            raise UserError(f"--cells: {name!r} is unknown; choose from {', '.join(sorted(known))}")
    return [cell for cell in everything if cell.group in wanted or cell.name in wanted]
