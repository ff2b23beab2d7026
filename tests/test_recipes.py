"""Every recipe is complete, builds, and says what it costs; every setting is read by some code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from shoestring import recipes
from shoestring.config import MixerConfig, TransformerConfig, parse_yaml, schema, to_yaml
from shoestring.models.files import build_network
from shoestring.models.microdit import MicroDiT
from shoestring.models.transformer import parameter_counts
from shoestring.recipes.microdit import BATCH, tiny2, tiny2_paper, xl2
from shoestring.runtime import UserError


def on_meta(config: TransformerConfig) -> MicroDiT:
    with torch.device("meta"):
        return MicroDiT(config)


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_builds_round_trips_and_explains_itself(name: str) -> None:
    config = recipes.get(name)
    assert config.name == name
    assert parse_yaml(to_yaml(config, recipes.describe(name))) == config
    with torch.device("meta"):
        model = build_network(config)
    side = config.stages[-1].resolution // (8 if config.data.codec == "autoencoder-kl" else 1)
    assert side % model.patch_size == 0
    assert config.model.caption_dim == {"hashing": 256, "minilm": 384, "clip": 1024}[config.data.text_encoder]
    for word in ("Paper:", "Hardware:", "Hours:", "Dollars:", "Metric:"):
        assert word in recipes.describe(name)


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [(tiny2(), 200_692_752, 120_476_688), (xl2(), 1_165_442_320, 712_457_488)],
)
def test_released_presets_have_the_published_size(config: TransformerConfig, total: int, active: int) -> None:
    assert parameter_counts(on_meta(config)) == (total, active)


def mixer_share(config: TransformerConfig) -> float:
    counts = {"patch_mixer": 0, "blocks": 0}
    for name, parameter in on_meta(config).named_parameters():
        for part in counts:
            counts[part] += parameter.numel() if name.startswith(part) else 0
    return counts["patch_mixer"] / counts["blocks"]


def test_the_papers_mixer_is_below_a_tenth_of_the_backbone() -> None:
    config = tiny2_paper()
    assert config.mixer.depth == 4
    with_experts = config.model_copy(update={"experts": tiny2().experts})
    assert 0.08 < mixer_share(config) < 0.1
    assert 0.08 < mixer_share(with_experts) < 0.1
    wider = MixerConfig(depth=4, dim=config.mixer.dim + config.head_dim)
    assert mixer_share(config.model_copy(update={"mixer": wider})) > 0.1
    assert 0.36 < mixer_share(tiny2()) < 0.38  # with maps and experts, as released


def test_xl2_is_the_released_schedule() -> None:
    config = recipes.get("microdit-xl2")
    rows = [
        (
            s.mask_ratio,
            s.nimg // BATCH,
            s.batch,
            s.micro_batch,
            s.resolution,
            s.position_scale,
            s.lr,
            s.clip_norm,
        )
        for s in config.stages
    ]
    assert rows == [
        (0.75, 250_000, 2048, 256, 256, 1.0, 2.4e-4, 0.25),
        (0.0, 30_000, 2048, 64, 256, 1.0, 8e-5, 0.25),
        (0.75, 50_000, 2048, 32, 512, 2.0, 8e-5, 0.5),
        (0.0, 5_000, 2048, 16, 512, 2.0, 8e-5, 0.5),
    ]
    assert sum(stage.steps for stage in config.stages) == 335_000
    assert [stage.warmup_nimg // BATCH for stage in config.stages] == [2_500, 0, 500, 0]
    assert [(s.lr_schedule, s.lr_end_ratio) for s in config.stages[:2]] == [("cosine", 0.33), ("constant", 0)]
    assert [(s.noise.mean, s.noise.std) for s in config.stages] == [(-0.6, 1.2)] * 2 + [(0.0, 0.6)] * 2
    assert [(s.ema_decay, s.ema_start_nimg // BATCH) for s in config.stages] == [
        (None, 0),
        (None, 0),
        (0.99975, 25_000),
        (0.9975, 1_000),
    ]
    assert [stage.keep_optimizer for stage in config.stages] == [True, True, False, True]
    assert [stage.min_side for stage in config.stages] == [None, None, 512, 512]


@pytest.mark.parametrize("name", ["demo", "demo-shapes", "openmoji-all"])
def test_demos_keep_deferred_masking(name: str) -> None:
    stages = recipes.get(name).stages
    masked = sum(stage.nimg for stage in stages if stage.mask_ratio >= 0.5)
    assert masked >= sum(stage.nimg for stage in stages) / 2
    assert stages[-1].mask_ratio == 0
    assert recipes.get(name).model.mixer.depth > 0


def test_resolve_takes_recipes_files_and_overrides(tmp_path: Path) -> None:
    assert recipes.resolve("demo") == recipes.get("demo")
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(recipes.get("demo")))
    changed = recipes.resolve(str(path), ["model.depth=2", "data.source=folder"])
    assert (changed.model.depth, changed.data.source) == (2, "folder")
    assert changed == recipes.resolve("demo", ["model.depth=2", "data.source=folder"])


def test_unknown_recipes_get_the_nearest_name() -> None:
    with pytest.raises(UserError, match="unknown recipe 'microdit-xl'; did you mean 'microdit-xl2'"):
        recipes.resolve("microdit-xl")
    with pytest.raises(UserError, match="give a YAML file"):
        recipes.get("?")
    with pytest.raises(UserError, match="cannot read the configuration"):
        recipes.resolve("absent.yaml")


def all_settings() -> list[str]:
    """Every setting of every section, as ``Section.name``."""
    return [
        f"{section.__name__}.{name}"
        for section in vars(schema).values()
        if isinstance(section, type) and issubclass(section, schema.Frozen)
        for name in section.model_fields
    ]


def attributes_read(root: Path) -> set[str]:
    """Names read as attributes anywhere but where settings are declared, checked and filled in.

    ``schema.py`` counts where it computes something of a setting, not where it validates; so does
    the name of a setting that is handed to ``per_block``.
    """
    read: set[str] = set()
    for path in (root / "src" / "shoestring").rglob("*.py"):
        tree = ast.parse(path.read_text())
        if path.parent.name == "recipes" or path.name in ("files.py", "explain.py"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "_fits":
                node.body = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "per_block":
                read |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return read


def test_every_setting_is_read_by_some_code(root: Path) -> None:
    read = attributes_read(root)
    unread = sorted(key for key in all_settings() if key.rpartition(".")[2] not in read)
    assert not unread, f"nothing reads {', '.join(unread)}"
