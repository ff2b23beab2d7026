"""The cells of the token-reduction study: what is trained, from one base recipe.

All cells share blocks, width, data, optimiser and process. Dense and deferred are one network; naive masking
spends the mixer's parameters on the backbone's feed-forwards, MaskDiT adds its decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from shoestring.config import (
    DataConfig,
    DecoderConfig,
    ExpertsConfig,
    LoggingConfig,
    MixerConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    ProcessConfig,
    Ramp,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TokensConfig,
)
from shoestring.planning import model_flops
from shoestring.runtime import UserError

MEASURED = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of its images after which every training is measured: evenly on the logarithmic axis of budgets."""
LR = 1.5e-3


@dataclass(frozen=True)
class Preset:
    """Size of a study."""

    name: str
    source: str
    condition: str
    classes: int
    resolution: int
    dim: int
    depth: int
    mixer_dim: int
    nimg: int
    batch: int
    samples: int
    many_samples: int
    """For cells with several seeds."""
    sampling_steps: int
    validation_images: int
    compile: bool

    def rounded(self, nimg: float) -> int:
        """Images in whole steps, and every measured share of them too."""
        unit = self.batch * round(1 / MEASURED[0])
        return max(unit, round(nimg / unit) * unit)


PRESETS = {
    "tiny": Preset(
        name="tiny",
        source="shapes",
        condition="none",
        classes=1,
        resolution=24,
        dim=64,
        depth=4,
        mixer_dim=16,
        nimg=2_560,
        batch=16,
        samples=128,
        many_samples=128,
        sampling_steps=6,
        validation_images=64,
        compile=False,
    ),
    "cifar10": Preset(
        name="cifar10",
        source="cifar10",
        condition="class",
        classes=10,
        resolution=32,
        dim=96,
        depth=6,
        mixer_dim=24,
        nimg=61_440,
        batch=64,
        samples=2_000,
        many_samples=5_000,
        sampling_steps=9,
        validation_images=500,
        compile=True,
    ),
}


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


def base_recipe(preset: Preset, data_path: str | None, nimg: int) -> RunConfig:
    """The recipe that all cells change: dense, with the mixer in the paper's proportion.

    Args:
        preset: size of the study.
        data_path: where the pictures are, for presets that need it.
        nimg: images of one training.

    Returns:
        The recipe.
    """
    model = ModelConfig(
        in_channels=3,
        condition=preset.condition,
        classes=preset.classes,
        patch_size=2,
        dim=preset.dim,
        depth=preset.depth,
        head_dim=preset.mixer_dim,
        qkv_multipliers=(1.0,),
        ffn_multipliers=(4.0,),
        ffn_multiple_of=8,
        mixer=MixerConfig(depth=4, dim=preset.mixer_dim),
        experts=ExpertsConfig(count=0),
    )
    stage = StageConfig(
        name="train",
        nimg=nimg,
        batch=preset.batch,
        resolution=preset.resolution,
        lr=LR,
        warmup_nimg=nimg // 20,
        clip_norm=1.0,
        noise=NoiseConfig(mean=-1.2, std=1.2),
        ema_decay=0.999,
        ema_rampup=0.1,
    )
    return RunConfig(
        name="study-tokens",
        compile=preset.compile,
        model=model,
        tokens=TokensConfig(method="dense"),
        process=ProcessConfig(kind="edm", sigma_data=0.5),
        data=DataConfig(source=preset.source, path=data_path, text_encoder="hashing"),
        stages=(stage,),
        optimizer=OptimizerConfig(kind="muon", weight_decay=0.01, muon_lr_scale=10 / 3),
        sampling=SamplingConfig(sampler="heun", steps=preset.sampling_steps, guidance=1.0),
        logging=LoggingConfig(
            log_nimg=max(preset.batch, nimg // 40),
            validate_nimg=nimg,
            sample_nimg=nimg,
            checkpoint_nimg=round(nimg * MEASURED[0]),
            keep_checkpoints=round(1 / MEASURED[0]) + 2,
            tensorboard=False,
        ),
    )


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
    last = {"name": "tail", "nimg": steps * stage.batch, "warmup_nimg": 0, "mask_ratio": 0.0}
    if cell.tail_cosine:
        last |= {"mask_ratio": stage.mask_ratio, "mask_ratio_end": 0.0, "mask_schedule": "cosine"}
    return first, stage.model_copy(update=last)


# ------------------------------------------------------------------------------- a recipe for each method


def with_model(config: RunConfig, **changes: object) -> RunConfig:
    """Change settings of the network."""
    values = config.model.model_dump() | changes
    return config.model_copy(update={"model": ModelConfig(**values)})


def with_tokens(config: RunConfig, **changes: object) -> RunConfig:
    """Change settings of the token method."""
    values = config.tokens.model_dump() | changes
    return config.model_copy(update={"tokens": TokensConfig(**values)})


def with_stages(config: RunConfig, **changes: object) -> RunConfig:
    """Change settings of all stages."""
    stages = tuple(StageConfig(**(stage.model_dump() | changes)) for stage in config.stages)
    return config.model_copy(update={"stages": stages})


def parameters(model: ModelConfig, tokens: TokensConfig) -> int:
    """Parameters of a network, built on the meta device."""
    import torch

    from shoestring.models.files import FAMILIES

    with torch.device("meta"):
        return sum(p.numel() for p in FAMILIES[model.kind](model, tokens).parameters())


def _dense(base: RunConfig, ratio: float) -> RunConfig:
    return base


def _deferred(base: RunConfig, ratio: float) -> RunConfig:
    return with_stages(with_tokens(base, method="deferred"), mask_ratio=ratio)


def _without_mixer(base: RunConfig) -> RunConfig:
    return with_model(base, mixer=MixerConfig(depth=0, dim=base.model.mixer.dim))


def _naive(base: RunConfig, ratio: float) -> RunConfig:
    """No mixer; the feed-forwards grow until the parameters are those of the network with mixer."""
    bare = with_tokens(_without_mixer(base), method="naive")
    target = parameters(base.model, base.tokens)
    candidates = [with_model(bare, ffn_multipliers=(4 + step / 16,)) for step in range(64)]
    best = min(candidates, key=lambda c: abs(parameters(c.model, c.tokens) - target))
    return with_stages(best, mask_ratio=ratio)


def _maskdit(base: RunConfig, ratio: float) -> RunConfig:
    decoder = DecoderConfig(depth=2, dim=base.model.dim // 2, head_dim=base.model.head_dim)
    config = with_model(_without_mixer(base), decoder=decoder)
    return with_stages(with_tokens(config, method="maskdit", reconstruction=0.1), mask_ratio=ratio)


def _middle(base: RunConfig, ratio: float, method: str) -> RunConfig:
    """All but the first and the last block see fewer tokens."""
    config = with_tokens(_without_mixer(base), method=method, first=1, last=-1)
    return with_stages(config, mask_ratio=ratio)


def _large_patch(base: RunConfig, ratio: float) -> RunConfig:
    return with_model(base, patch_size=2 * base.model.patch_size)


def _small_model(base: RunConfig, ratio: float) -> RunConfig:
    """Dense, no mixer, narrower or shallower: the training FLOPs of deferred masking at this ratio."""
    deferred = _deferred(base, ratio)
    target = training_flops(deferred, deferred.stages[0])
    side = base.stages[0].resolution // base.model.patch_size
    return with_model(_without_mixer(base), **_smaller(base.model, side, target))


@lru_cache(maxsize=32)
def _smaller(model: ModelConfig, side: int, target: float) -> dict[str, object]:
    best: tuple[float, dict[str, object]] | None = None
    for dim in range(model.head_dim, model.dim + 1, model.head_dim):
        for depth in range(1, model.depth + 1):
            for quarter in range(4, 29):
                change: dict[str, object] = {
                    "dim": dim,
                    "depth": depth,
                    "ffn_multipliers": (quarter / 4,),
                    "mixer": MixerConfig(depth=0, dim=model.mixer.dim),
                }
                small = ModelConfig(**(model.model_dump() | change))
                flops = model_flops(small, (side, side), 0, 0.0, TokensConfig(method="dense")).training
                # Within 2 %; then as near as possible to the usual feed-forward of 4.
                penalty = max(0.0, abs(flops / target - 1) - 0.02) * 100 + abs(quarter / 4 - 4)
                if best is None or penalty < best[0]:
                    best = penalty, change
    assert best is not None
    return best[1]


METHOD_RECIPES: dict[str, Callable[[RunConfig, float], RunConfig]] = {
    "dense": _dense,
    "deferred": _deferred,
    "naive": _naive,
    "maskdit": _maskdit,
    "tread": lambda base, ratio: _middle(base, ratio, "tread"),
    "sprint": lambda base, ratio: _middle(base, ratio, "sprint"),
    "large-patch": _large_patch,
    "small-model": _small_model,
}


def training_flops(config: RunConfig, stage: StageConfig, ratio: float | None = None) -> float:
    """Training FLOPs of one image in a stage (at its first ratio unless another is given)."""
    side = stage.resolution // config.model.patch_size
    ratio = stage.mask_ratio if ratio is None else ratio
    return model_flops(config.model, (side, side), config.data.max_tokens, ratio, config.tokens).training


# ---------------------------------------------------------------------------------------------- the cells


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
    """Eight experts in every second block, each of the width of the dense feed-forward's FLOPs."""
    return with_model(config, experts=ExpertsConfig(count=8, capacity=2.0, every=2))


def _seeds(cell: Cell, count: int = 3) -> list[Cell]:
    return [replace(cell, seed=seed, many=True) for seed in range(count)]


def core_cells() -> list[Cell]:
    """The main comparison; the cells that answer most come first."""
    three = ("deferred", "naive")
    cells = [Cell("dense", "core", "dense", many=True)]
    cells += [Cell(f"{m}-0.75", "core", m, 0.75, many=True) for m in three]
    cells += [
        Cell("large-patch", "core", "large-patch", many=True),
        Cell("maskdit-0.75", "core", "maskdit", 0.75),
        Cell("small-model-0.75", "core", "small-model", 0.75),
        Cell("tread-0.5", "core", "tread", 0.5),
        Cell("sprint-0.75", "core", "sprint", 0.75),
        Cell("deferred-0.75-tail10", "core", "deferred", 0.75, tail=0.1),
        Cell("naive-0.75-tail10", "core", "naive", 0.75, tail=0.1),
    ]
    for ratio in (0.5, 0.875):
        cells += [
            Cell(f"{method}-{ratio:g}", "core", method, ratio)
            for method in ("deferred", "naive", "maskdit", "small-model")
        ]
    for seed in (1, 2):
        cells += [replace(cell, seed=seed) for cell in cells[:4]]
    return cells


def ablation_cells() -> list[Cell]:
    """The papers' other ablations."""
    wide = Cell("naive-0.75-layer-wise", "ablations", "naive", 0.75, change=_layer_wise)
    moe = Cell("deferred-0.75-experts", "ablations", "deferred", 0.75, change=_experts)
    cells = [*_seeds(wide), *_seeds(moe)]
    for depth in (2, 6):

        def mixer(config: RunConfig, depth: int = depth) -> RunConfig:
            return with_model(config, mixer=MixerConfig(depth=depth, dim=config.model.mixer.dim))

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
    scales = (1.25, 1.5, 2.0, 3.0)
    cells.append(Cell("deferred-0.75-tail0", "tuning", "deferred", 0.75, guidance=scales))
    for share in (0.01, 0.025, 0.05):
        for cosine in (False, True):
            name = f"deferred-0.75-{'cosine' if cosine else 'tail'}{100 * share:g}"
            cells.append(
                Cell(name, "tuning", "deferred", 0.75, tail=share, tail_cosine=cosine, guidance=scales)
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

    methods = (("dense", 0.0), ("deferred", 0.75), ("tread", 0.5), ("sprint", 0.75))
    return [
        Cell(f"{m}{f'-{r:g}' if r else ''}-1024", "long", m, r, change=fine, share=1 / 3) for m, r in methods
    ]


def check_cells() -> list[Cell]:
    """Half and twice the learning rate for both sides of the main comparison."""
    cells = []
    for name, method, ratio in (("dense", "dense", 0.0), ("deferred-0.75", "deferred", 0.75)):
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
