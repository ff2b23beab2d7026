"""Compiled blocks: how many graphs, what runs beside them, and that they compute the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoestring import recipes
from shoestring.config import ExpertsConfig, TokensConfig, TransformerConfig
from shoestring.planning import patch_grid
from shoestring.training.step_shapes import (
    AttentionShape,
    StepShape,
    padded_length,
    stage_shapes,
    trace_shapes,
)

SCRIPT = Path(__file__).parent / "compiled_blocks.py"


@pytest.mark.parametrize(
    "case", ["counted", "checkpointed", "sharded", pytest.param("generated", marks=pytest.mark.slow)]
)
def test_compiled(case):
    environment = os.environ | {"JAXTYPING_DISABLE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT, case], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# -- which shapes there are --------------------------------------------------------------------------------

SMALL = TransformerConfig(
    caption_dim=8, dim=32, depth=4, head_dim=16, ffn_multiple_of=16, experts=ExpertsConfig(count=0)
)


def test_caption_lengths_are_multiples_of_8_up_to_the_longest():
    assert [padded_length(n, 77) for n in (1, 8, 9, 72, 73, 77)] == [8, 8, 16, 72, 77, 77]
    assert padded_length(3, 5) == 5


def test_shapes_of_a_stage():
    config = recipes.resolve("demo", ["stages.0.mask_ratio_end=0.25", "stages.0.nimg=9600"])
    stage = config.stages[0]
    shapes = stage_shapes(config, stage, patch_grid(config, stage, 1), [48, 48])
    assert {s.mask_ratio for s in shapes} == {i / 16 for i in range(4, 9)}
    assert {s.captions for s in shapes} == {8, 16}
    assert {(s.images, s.grid) for s in shapes} == {(48, (8, 8))}
    assert len(shapes) == 5 * 2
    padding_attended = config.model_copy(
        update={"model": config.model.model_copy(update={"mask_captions": False})}
    )
    assert {s.captions for s in stage_shapes(padding_attended, stage, (8, 8), [48])} == {16}


def test_blocks_see_what_the_token_method_gives_them():
    shapes = [StepShape(2, (4, 4), 0.5, 8), StepShape(3, (4, 4), 0.0, 8)]
    deferred = trace_shapes(SMALL, TokensConfig(), shapes)
    assert deferred.blocks["patch_mixer.0"] == {(2, 16, 8), (3, 16, 8)}
    assert deferred.blocks["blocks.0"] == deferred.blocks["blocks.3"] == {(2, 8, 8), (3, 16, 8)}
    tread = trace_shapes(SMALL, TokensConfig(method="tread", first=1, last=3), shapes)
    assert tread.blocks["blocks.0"] == tread.blocks["blocks.3"] == {(2, 16, 8), (3, 16, 8)}
    assert tread.blocks["blocks.1"] == tread.blocks["blocks.2"] == {(2, 8, 8), (3, 16, 8)}


@pytest.mark.parametrize("masked", [False, True])
def test_attention_shapes(masked):
    model = SMALL.model_copy(update={"mask_captions": masked})
    seen = trace_shapes(model, TokensConfig(), [StepShape(2, (4, 4), 0.5, 6)]).attention
    assert seen == {
        AttentionShape(16, 16, 16, False),
        AttentionShape(16, 6, 16, masked),
        AttentionShape(8, 8, 16, False),
        AttentionShape(8, 6, 16, masked),
        AttentionShape(6, 6, 16, masked),
    }
