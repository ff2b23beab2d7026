"""Settings that every test shares: quiet threads, checked shapes, reproducible properties."""

from __future__ import annotations

import os

# Before torch is imported: busy waiting collapses when pytest-xdist's workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from collections.abc import Callable
from pathlib import Path

from jaxtyping import install_import_hook

# Shapes named in annotations are checked whenever a test calls these modules. It works on modules that are
# imported from here on, so it stands before any import of shoestring.
if os.environ.get("JAXTYPING_DISABLE") != "1":
    install_import_hook(
        ["shoestring.tensors", "shoestring.models", "shoestring.diffusion", "shoestring.sampling"],
        "beartype.beartype",
    )

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# Time limits per example would fail on a busy machine; the fixed seed makes a failure come back.
settings.register_profile(
    "shoestring",
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("shoestring")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository that holds golden tensors; skip where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder 'shared' beside the repository ({ROOT.name}): golden files are not at hand")
    return folder


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Call the command line with some words; what it says of a user's mistake: one sentence, exit code 2."""
    from shoestring import cli

    def call(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["shoestring", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr().err.strip()
        assert stopped.value.code == 2, said
        assert said.startswith("shoestring: ")
        assert "\n" not in said
        return said

    return call
