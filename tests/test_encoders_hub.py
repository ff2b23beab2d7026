"""Weights by hub name on a machine without a network: from the cache, or a sentence that says what to do."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow  # a process each, which imports diffusers

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOBODY = "http://127.0.0.1:9"  # no port that anybody listens on


def answers(code: str, tmp_path: Path, **environment: str) -> Any:
    """What a fresh process prints as JSON: the libraries read the environment once, when imported."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "http", "HTTP"))}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        env={**clean, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": NOBODY, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return json.loads(done.stdout)


PRELUDE = """
import json, time
from shoestring.config import DataConfig
from shoestring.encoders.image import build_codec
from shoestring.encoders.text import build_text_encoder
from shoestring.runtime import UserError

def said(build, **settings):
    from transformers import CLIPTextModel, CLIPTokenizer  # not to be timed
    if build is build_codec:
        from diffusers import AutoencoderKL
    started = time.monotonic()
    try:
        build(DataConfig(**settings))
    except UserError as error:
        assert time.monotonic() - started < 15, time.monotonic() - started  # the libraries alone take 23 s
        return str(error)
"""
CLIP = "apple/DFN5B-CLIP-ViT-H-14-378"


def check_helps(sentence: str, field: str, name: str, file: str, why: str) -> None:
    assert sentence.startswith(f"{field} is '{name}': no such folder")
    assert why in sentence
    assert f"hf download {name}" in sentence
    assert "or give a folder with config.json" in sentence
    assert file in sentence
    assert "\n" not in sentence


def test_without_a_network_the_answer_is_quick_and_helps(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    codec, clip, t5 = answers(
        f"""
        print(json.dumps([
            said(build_codec, codec="autoencoder-kl", codec_path="stabilityai/sdxl-vae"),
            said(build_text_encoder, text_encoder="clip", text_encoder_path="{CLIP}"),
            said(build_text_encoder, text_encoder="t5", text_encoder_path="./weights/of/t5"),
        ]))
        """,
        tmp_path,
    )
    file = "diffusion_pytorch_model.safetensors"
    check_helps(codec, "data.codec_path", "stabilityai/sdxl-vae", file, "onnect")
    check_helps(clip, "data.text_encoder_path", CLIP, "model.safetensors", "onnect")
    assert "'./weights/of/t5', which is neither a folder that exists nor a hub name" in t5


def test_the_hub_is_left_alone_where_told(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    code = f'print(json.dumps(said(build_text_encoder, text_encoder="clip", text_encoder_path="{CLIP}")))'
    found = answers(code, tmp_path, HF_HUB_OFFLINE="1")
    check_helps(found, "data.text_encoder_path", CLIP, "model.safetensors", "HF_HUB_OFFLINE is set")


def test_weights_of_the_cache_need_no_network(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    cached = tmp_path / "home" / "hub" / "models--somebody--vae"
    model.save_pretrained(cached / "snapshots" / COMMIT / "vae")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    shutil.copytree(cached / "snapshots" / COMMIT, tmp_path / "folder")
    part = tmp_path / "home" / "hub" / "models--somebody--part"
    shutil.copytree(cached, part)
    (part / "snapshots" / COMMIT / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    found = answers(
        f"""
        hub = build_codec(DataConfig(codec="autoencoder-kl", codec_path="somebody/vae")).identity
        folder = build_codec(DataConfig(codec="autoencoder-kl", codec_path="{tmp_path}/folder")).identity
        part = said(build_codec, codec="autoencoder-kl", codec_path="somebody/part")
        print(json.dumps([hub.source, hub.revision, folder.revision, hub.same(folder), part]))
        """,
        tmp_path,
    )
    assert found[:4] == ["somebody/vae", COMMIT, "", True]
    assert "cannot load a diffusers AutoencoderKL" in found[4]
    assert "what the hub's cache on this machine lacks, 'hf download somebody/part' fetches" in found[4]
