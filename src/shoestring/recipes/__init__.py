"""Ready-made runs. A recipe is a function that returns a ``RunConfig``; its docstring says what to expect.

Docstrings name the paper, the hardware, hours, dollars and the metric, each marked *published* (by others),
*predicted* (computed, never run) or *measured* (run here; EXPERIMENTS.md says how).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

from shoestring.config import RunConfig, StageConfig
from shoestring.config.explain import nearest
from shoestring.config.files import apply_overrides, load_yaml
from shoestring.recipes import demo, ldm, maskdit, microdit
from shoestring.runtime import UserError

__all__ = ["RECIPES", "describe", "get", "names", "published_gflop", "resolve"]

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "demo": demo.demo,
    "demo-shapes": demo.demo_shapes,
    "openmoji-all": demo.openmoji_all,
    "microdit-tiny2": microdit.microdit_tiny2,
    "microdit-tiny2-paper": microdit.microdit_tiny2_paper,
    "microdit-xl2": microdit.microdit_xl2,
    "maskdit-xl2-256": maskdit.maskdit_xl2_256,
    "maskdit-xl2-512": maskdit.maskdit_xl2_512,
    "maskdit-b2-text": maskdit.maskdit_b2_text,
    "maskdit-b2-unconditional": maskdit.maskdit_b2_unconditional,
    "dit-xl2-256": maskdit.dit_xl2_256,
    **ldm.RECIPES,
}


PUBLISHED_GFLOP: dict[str, dict[str, float]] = {"microdit-xl2": microdit.PUBLISHED_GFLOP}


def names() -> tuple[str, ...]:
    """Names of all recipes."""
    return tuple(RECIPES)


def get(name: str) -> RunConfig:
    """The settings of a recipe.

    Args:
        name: one of :func:`names`.

    Returns:
        A complete configuration.

    Raises:
        UserError: if there is no such recipe; the nearest name is given.
    """
    return _function(name)()


def describe(name: str) -> str:
    """What a recipe is and what to expect of it; the first line is a summary.

    Args:
        name: one of :func:`names`.

    Returns:
        The recipe's docstring, without indentation.

    Raises:
        UserError: if there is no such recipe.
    """
    return inspect.getdoc(_function(name)) or ""


def resolve(name_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings that a command was asked for.

    Args:
        name_or_path: a recipe's name, or a YAML file (anything that ends in .yaml or .yml or has a slash).
        overrides: ``key.sub=value``, applied in order.

    Returns:
        The configuration after the overrides.

    Raises:
        UserError: if neither a recipe nor a readable file is meant, or a setting is wrong.
    """
    is_file = name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path or "\\" in name_or_path
    config = load_yaml(Path(name_or_path)) if is_file else get(name_or_path)
    return apply_overrides(config, overrides)


def published_gflop(config: RunConfig) -> dict[str, float]:
    """Published training GFLOP an image, for stages that are as the recipe of that name has them.

    Args:
        config: a recipe, perhaps changed.

    Returns:
        Figures by name of the stage; empty where none is known.
    """
    table = PUBLISHED_GFLOP.get(config.name, {})
    if not table:
        return {}

    def shape(run: RunConfig, stage: StageConfig) -> tuple[object, ...]:
        ratios = (stage.mask_ratio, stage.mask_ratio_end)
        return run.model, run.tokens, run.data.codec, run.data.max_tokens, stage.resolution, ratios

    recipe = get(config.name)
    own = {stage.name: shape(recipe, stage) for stage in recipe.stages}
    return {
        s.name: table[s.name] for s in config.stages if s.name in table and shape(config, s) == own[s.name]
    }


def _function(name: str) -> Callable[[], RunConfig]:
    if name in RECIPES:
        return RECIPES[name]
    near = nearest(name, names())
    if near is not None:
        raise UserError(f"unknown recipe {name!r}; did you mean {near!r}?")
    raise UserError(f"unknown recipe {name!r}; give a YAML file (.yaml) or one of {', '.join(names())}")
