"""Averages of any length after training, against averages of that length kept while training."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shoestring import cli
from shoestring.config import ExpertsConfig, MixerConfig, RunConfig, StageConfig, TransformerConfig
from shoestring.models.files import ModelFacts, build_network, load_model, save_model
from shoestring.runtime import UserError, stream
from shoestring.training.averages import Averages, power_gamma
from shoestring.training.posthoc import find_stored, fit, overlap, reconstruct

LENGTHS = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
TRACKS = (0.05, 0.1)
BATCH, STEPS = 4, 640


def config(**model: object) -> RunConfig:
    small = {
        "in_channels": 3,
        "condition": "none",
        "dim": 32,
        "depth": 1,
        "head_dim": 16,
        "ffn_multiple_of": 16,
        "mixer": MixerConfig(depth=0),
        "experts": ExpertsConfig(count=0),
    }
    stage = StageConfig(name="s", nimg=BATCH * STEPS, batch=BATCH, lr=1.0)
    return RunConfig(name="walk", model=TransformerConfig(**small | model), stages=(stage,), power_ema=TRACKS)


def save(run: Path, folder: str, nimg: int, averages: Averages, config: RunConfig) -> None:
    place = run / folder / f"{nimg:09d}"
    place.mkdir(parents=True, exist_ok=True)
    for length in TRACKS:
        facts = ModelFacts(nimg, f"power-{length:g}", 0.5, 1.0, 32)
        save_model(
            place / f"power-{length:g}.safetensors", averages.named(f"power-{length:g}"), config, facts
        )


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors]).double()


def walk(run: Path, snapshots: int) -> tuple[dict[float, Tensor], Tensor]:
    """Weights that settle down while they are pushed at random, with stored tracks as a run leaves them.

    Returns:
        Direct averages by length, and the root mean square of the weights' distance from their mean.
    """
    network = build_network(config(), stream(0, "init"))
    direct = Averages(network, LENGTHS)
    parameters = list(network.parameters())
    sizes = [p.numel() for p in parameters]
    goal = torch.randn(sum(sizes), generator=stream(0, "goal"))
    weights = flat(parameters).float()
    path = []
    for step in range(1, STEPS + 1):
        push = torch.randn(len(weights), generator=stream(0, "push", step))
        weights = weights + 4 / (step + 40) * (goal - weights) + 0.05 * push
        with torch.no_grad():
            for p, part in zip(parameters, weights.split(sizes), strict=True):
                p.copy_(part.view_as(p))
        direct.update(0.9, step * BATCH, BATCH)
        path.append(weights)
        if step % (STEPS // snapshots) == 0:
            # The last one is a checkpoint, those before were deleted and left their averages.
            save(run, "checkpoints" if step == STEPS else "snapshots", step * BATCH, direct, config())
    spread = torch.stack(path).double().std(dim=0).square().mean().sqrt()
    return {length: flat(direct.tracks[f"power-{length:g}"]) for length in LENGTHS}, spread


@pytest.mark.parametrize(
    ("snapshots", "bounds"), [(8, (0.05, 0, 0.005, 0, 0.008, 0.02)), (32, (0.002, 0, 1e-4, 0, 2e-4, 6e-4))]
)
def test_reconstructed_averages_are_near_direct_ones(
    tmp_path: Path, snapshots: int, bounds: tuple[float, ...]
) -> None:
    """As a share of how far the weights moved; stored lengths come back, more snapshots come nearer.

    Cauchy and Schwarz bound the error by the residual of the fit: the coefficients' sum is one, so that only
    the movement counts, not the weights' size.
    """
    direct, spread = walk(tmp_path, snapshots)
    made = reconstruct([tmp_path], LENGTHS)
    assert [each.length for each in made] == list(LENGTHS)
    for each, bound in zip(made, bounds, strict=True):
        _, network, facts = load_model(each.path)
        apart = (flat(list(network.parameters())) - direct[each.length]).square().mean().sqrt()
        gamma = power_gamma(each.length)
        norm = (gamma + 1) / (2 * gamma + 1) ** 0.5
        assert apart <= (each.residual * norm + 1e-5) * spread
        assert apart <= (bound + 1e-6) * spread
        assert facts.nimg == BATCH * STEPS
        assert facts.weights == f"power-{each.length:g}"


def test_products_of_power_functions_are_their_integrals() -> None:
    share = (np.arange(200_000) + 0.5) / 200_000
    for a, b in (((6.94, 1.0), (6.94, 1.0)), ((16.97, 0.6), (6.94, 1.0)), ((16.97, 1.0), (2.0, 0.3))):
        shapes = [(g + 1) / n * (share / n) ** g * (share < n) for g, n in (a, b)]
        found = overlap(*(np.array(v) for v in (*a, *b)))
        assert found == pytest.approx(float((shapes[0] * shapes[1]).mean()), rel=1e-4)


def test_coefficients_sum_to_one_and_more_snapshots_fit_better() -> None:
    residuals = []
    for count in (4, 8, 16, 32):
        stored = [(power_gamma(s), 1000 * (i + 1) // count) for s in TRACKS for i in range(count)]
        coefficients, residual = fit(stored, power_gamma(0.15), 1000)
        assert coefficients.sum() == pytest.approx(1, abs=1e-9)
        residuals.append(residual)
    assert all(after < before / 2 for before, after in zip(residuals, residuals[1:], strict=False))
    assert residuals[-1] < 0.003


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two snapshots and a checkpoint."""
    network = build_network(config(), stream(0, "init"))
    averages = Averages(network, TRACKS)
    for step, folder in enumerate(("snapshots", "snapshots", "checkpoints"), start=1):
        averages.update(0.9, step * 100, 100)
        save(tmp_path / "run", folder, step * 100, averages, config())
    return tmp_path / "run"


def test_the_command_writes_models(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run, or of chosen checkpoints; a deleted checkpoint's averages may be met twice."""
    shutil.copytree(run / "snapshots" / "000000200", run / "checkpoints" / "000000200")
    assert [stored.nimg for stored in find_stored([run])] == [100, 100, 200, 200, 300, 300]
    monkeypatch.setattr(sys, "argv", ["shoestring", "ema", str(run), "--length", "0.05, 0.12,0.05"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (None, 0)
    said = capsys.readouterr().out
    files = sorted((run / "averages").iterdir())
    assert [f.name for f in files] == [f"ema-{s}-at-000000300.safetensors" for s in ("0.05", "0.12")]
    assert all(str(f) in said for f in files)
    start = load_model(run / "checkpoints" / "000000300" / "power-0.05.safetensors")[1]
    for file in files:  # the weights never moved, so that every average is what they were
        for a, b in zip(load_model(file)[1].parameters(), start.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    made = reconstruct([run / "snapshots" / "000000200"], [0.1], run / "own")
    assert made[0].path == run / "own" / "ema-0.1-at-000000200.safetensors"
    assert find_stored([run])[-1].nimg == 300  # results are not taken for stored averages


def test_mistakes_are_sentences(run: Path, tmp_path: Path, mistake: Callable[..., str]) -> None:
    def ema(*places: Path, length: str = "0.05") -> str:
        return mistake("ema", *places, "--length", length)

    assert "holds no power-function averages" in ema(tmp_path)
    assert "power_ema=[0.05,0.1]" in ema(tmp_path)
    assert "is not a folder" in ema(tmp_path / "nowhere")
    assert "the length of a power-function average is 0.4" in ema(run, length="0.05,0.4")
    assert "--length is 'long'" in ema(run, length="long")
    (tmp_path / "file").write_text("no folder")
    assert "choose another folder with --out" in mistake(
        "ema", run, "--length", "0.05", "--out", tmp_path / "file"
    )
    assert "power_ema.1 is 0.4; it must be" in mistake("recipes", "show", "demo", "power_ema=[0.05,0.4]")
    assert "two lengths are the same" in mistake("recipes", "show", "demo", "power_ema=[0.1,0.10]")
    last = run / "checkpoints" / "000000300"
    shutil.copy(last / "power-0.1.safetensors", last / "power-wide.safetensors")
    assert "is not named after the length" in ema(run)
    (last / "power-wide.safetensors").unlink()
    (last / "power-0.1.safetensors").write_bytes(b"x" * 100)
    assert "is damaged" in ema(run)
    assert not (run / "averages").exists()


def test_other_models_and_runs_are_not_mixed(run: Path, tmp_path: Path) -> None:
    def other(name: str, changed: RunConfig, nimg: int) -> Path:
        network = build_network(changed, stream(1, "init"))
        save(tmp_path / name, "checkpoints", nimg, Averages(network, TRACKS), changed)
        return tmp_path / name

    with pytest.raises(UserError, match="of different models; give the folders of one run"):
        find_stored([run, other("wide", config(dim=64), 400)])
    with pytest.raises(UserError, match=r"of different runs \(walk, seed 0, and walk, seed 7\)"):
        find_stored([run, other("seed", config().model_copy(update={"seed": 7}), 400)])
    with pytest.raises(UserError, match="averages at the same image of two runs"):
        find_stored([run, other("again", config(), 300)])
    with pytest.raises(UserError, match="has not seen an image yet"):
        find_stored([other("early", config(), 0)])
    faster = config(attention="sdpa", checkpoint_activations=True)  # may change while a run goes on
    shutil.copytree(
        other("faster", faster, 400) / "checkpoints" / "000000400", run / "checkpoints" / "000000400"
    )
    assert find_stored([run])[-1].nimg == 400
