"""Released files of MaskDiT and MicroDiT in and out: sizes found out, parts chosen, nothing executed."""

from __future__ import annotations

import os
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoestring.config import DecoderConfig, TokensConfig, TransformerConfig
from shoestring.models.maskdit import MaskDiT
from shoestring.models.microdit import MicroDiT
from shoestring.models.released import (
    load_released,
    read_released,
    read_tensors,
    to_released,
    write_released,
)
from shoestring.models.released_config import config_from_weights, maskdit_config
from shoestring.models.transformer import DiffusionTransformer
from shoestring.recipes.maskdit import DENSE, MASKDIT, SIZES, dit, maskdit
from shoestring.recipes.microdit import tiny2, tiny2_paper, xl2
from shoestring.runtime import UserError
from test_maskdit import CONDITIONS, SMALL, condition, on_meta, randomized


def shallow(classes: int = 7, decoder: bool = True) -> TransformerConfig:
    """One block of a released width: its size is found out from the file."""
    part = DecoderConfig(depth=1, dim=512, head_dim=32) if decoder else None
    return maskdit_config(dim=384, depth=1, heads=6, patch_size=4, classes=classes, decoder=part)


def same(a: DiffusionTransformer, b: DiffusionTransformer) -> bool:
    mine, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind", ["checkpoint.pt", "weights.safetensors"])
@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("classes", [7, 0])
def test_released_files_survive_the_round_trip_without_naming_a_size(kind, decoder, classes, tmp_path):
    config = shallow(classes, decoder)
    network = randomized(config, MASKDIT if decoder else DENSE)
    write_released(tmp_path / kind, network, side=8)
    copy = read_released(tmp_path / kind)
    assert copy.config == config
    assert not copy.training
    assert same(network, copy)
    x, given = torch.randn(2, 4, 32, 32), condition(config)
    outputs = [net(x, torch.zeros(2), given).visible_BKG for net in (network, copy)]
    assert torch.equal(*outputs)
    first, second = to_released(network, 8), to_released(copy, 8)
    assert all(name.startswith("model.") for name in first)
    assert first["model.pos_embed"].shape == (1, 64, 384)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_position_tables_of_the_file_are_kept(tmp_path):
    saved = to_released(randomized(shallow()), side=8)
    for name in ("model.pos_embed", "model.decoder_pos_embed"):
        saved[name] = saved[name] + 0.5
    save_file(saved, tmp_path / "file.safetensors")
    network = read_released(tmp_path / "file.safetensors")
    for name in ("pos_embed", "decoder_pos_embed"):
        like = torch.zeros(saved[f"model.{name}"].shape[-1])
        assert torch.equal(network.positions((8, 8), like, name), saved[f"model.{name}"][0])
        assert not torch.equal(network.positions((4, 4), like, name), saved[f"model.{name}"][0, :16])
    exported = to_released(network, side=8)
    assert torch.equal(exported["model.decoder_pos_embed"], saved["model.decoder_pos_embed"])


def test_checkpoint_gives_the_average_unless_asked_otherwise(tmp_path):
    last, average = (to_released(randomized(shallow(), seed=seed), side=8) for seed in (1, 2))
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    content = {"model": last, "ema": average, "opt": optimizer, "args": Namespace(results_dir="x", lr=1e-4)}
    torch.save(content, tmp_path / "0100000.pt")
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("0100000.pt", "old.pt"):
        for part, expected in (("ema", average), ("model", last)):
            got = read_tensors(tmp_path / name, part)
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[key], expected[key]) for key in got)
    assert same(read_released(tmp_path / "old.pt"), randomized(shallow(), seed=2))
    torch.save(content | {"ema": None}, tmp_path / "half.pt")
    with pytest.raises(UserError, match=r"has no part 'ema'; it has args, ema, model, opt"):
        read_released(tmp_path / "half.pt")
    assert same(read_released(tmp_path / "half.pt", part="model"), randomized(shallow(), seed=1))


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    tensors, trap = to_released(randomized(shallow()), side=8), tmp_path / "trap"
    contents = {
        "beside.pt": {"ema": tensors, "args": Malicious(trap)},
        "inside.pt": {"ema": tensors, "args": Namespace(path=Malicious(trap))},
        "instead.pt": Malicious(trap),
        "path.pt": {"ema": tensors, "args": Namespace(path=tmp_path)},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    torch.save(contents["beside.pt"], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"ema": Malicious(trap)}, protocol=2))
    for name in [*contents, "old.pt", "bare.pt"]:
        with pytest.raises(UserError, match=r"Python objects .*it was not read") as caught:
            read_released(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert not trap.exists(), name
    torch.load(tmp_path / "beside.pt", weights_only=False)
    assert trap.exists()  # the trap works


def test_files_that_do_not_fit_are_one_clear_sentence(tmp_path):
    saved = to_released(randomized(shallow()), side=8)
    first = "model.blocks.0.attn.qkv.weight"

    def changed(**changes: Tensor | None) -> dict[str, Tensor]:
        tensors = {k: v for k, v in saved.items() if changes.get(k, v) is not None}
        return tensors | {k: v for k, v in changes.items() if v is not None}

    wide = to_released(randomized(maskdit_config(48, 1, 2, 4, decoder=DecoderConfig(depth=1, dim=512))), 8)
    cases = {
        "missing": (changed(**{first: None}), "key 'blocks.0.attn.qkv.weight' is missing"),
        "unexpected": (changed(**{"model.cls_token": torch.zeros(1)}), "key 'cls_token' is unexpected"),
        "shape": (changed(**{first: torch.zeros(3, 3)}), r"blocks.0.attn.qkv.weight has shape \[3, 3\]"),
        "table": (
            changed(**{"model.pos_embed": torch.zeros(1, 5, 384)}),
            r"pos_embed has shape \[1, 5, 384\]",
        ),
        "embedder": (
            changed(**{"model.x_embedder.proj.weight": None}),
            "key 'x_embedder.proj.weight' is miss",
        ),
        "damaged": (changed(**{"model.x_embedder.proj.weight": torch.zeros(2)}), "make no network"),
        "foreign": ({"conv.weight": torch.zeros(1)}, "neither a released MaskDiT"),
        "width": (wide, "the encoder is 48 wide, and the released sizes are 384, 768"),
    }
    for name, (tensors, said) in cases.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=said) as caught:
            read_released(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value), name
    network = randomized(shallow().model_copy(update={"patch_size": 2}))
    before = [p.clone() for p in network.parameters()]
    with pytest.raises(UserError, match=r"final_layer.linear.bias has shape \[64\], this model needs \[16\]"):
        load_released(network, saved)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))
    with pytest.raises(UserError, match="key 'decoder_pos_embed' is unexpected; this model has no decoder"):
        load_released(randomized(shallow(decoder=False), DENSE), saved)


def test_unreadable_files_are_one_clear_sentence(tmp_path):
    (tmp_path / "text.pt").write_text("these are not tensors")
    (tmp_path / "text.safetensors").write_text("these are not tensors")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"ema": {"a": torch.zeros(100)}}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:700])
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save({"epoch": 3, "weight": torch.zeros(2)}, tmp_path / "mixed.pt")
    cases = {
        "absent.pt": "does not exist",
        "text.pt": "damaged or not a checkpoint",
        "text.safetensors": "damaged or not a safetensors file",
        "empty.pt": "damaged or not a checkpoint",
        "cut.pt": "damaged or not a checkpoint",
        "list.pt": "holds a list; a state dict",
        "mixed.pt": "entry 'epoch' is a int; a state dict has tensors only",
    }
    for name, said in cases.items():
        with pytest.raises(UserError, match=said) as caught:
            read_released(tmp_path / name)
        assert "\n" not in str(caught.value), name
    with pytest.raises(UserError, match=r"ends in '.bin'; released weights are .safetensors or .pt"):
        write_released(tmp_path / "x.bin", randomized(SMALL), side=4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch_size", [2, 8])
def test_size_is_found_out_from_the_weights(size, patch_size):
    for config, tokens in ((maskdit(size, patch_size), MASKDIT), (dit(size, patch_size, 10), DENSE)):
        names = dict(on_meta(config, tokens).named_parameters())
        assert config_from_weights(names, "file") == config


@pytest.mark.parametrize("config", [tiny2(), xl2(), tiny2_paper()], ids=["tiny2", "xl2", "tiny2 paper"])
def test_size_of_a_released_microdit_is_found_out_too(config):
    network = on_meta(config)
    found = config_from_weights(dict(network.named_parameters()), "file")
    shapes = {name: p.shape for name, p in network.named_parameters()}
    assert {name: p.shape for name, p in on_meta(found).named_parameters()} == shapes
    assert (found.head_dim, found.experts) == (config.head_dim, config.experts)


def test_released_microdit_survives_the_round_trip(tmp_path):
    config = tiny2().model_copy(update={"depth": 2, "caption_dim": 8})
    network = MicroDiT(config)
    network.initialize(torch.Generator().manual_seed(0))
    write_released(tmp_path / "dit.pt", network, side=16)
    assert "mask_token" in torch.load(tmp_path / "dit.pt", weights_only=True)
    assert same(read_released(tmp_path / "dit.pt"), network)


def test_models_without_a_released_form_say_so():
    microdit = tiny2().model_copy(update={"depth": 2, "condition": "none"})
    cases = [
        (
            on_meta(CONDITIONS["text"], MASKDIT),
            "model.condition is text; the released MaskDiT knows only class",
        ),
        (on_meta(SMALL.model_copy(update={"qk_norm": True}), MASKDIT), "model.qk_norm is True"),
        (on_meta(microdit), "model.condition is none; the released MicroDiT knows only text"),
        (
            on_meta(dit("S").model_copy(update={"depth": 8}), TokensConfig(method="sprint")),
            r"weights of its own \(routing.mask_token\)",
        ),
    ]
    for network, said in cases:
        with pytest.raises(UserError, match=said):
            to_released(network, side=16)


def test_golden_tables_are_ours(shared):
    with safe_open(shared / "golden" / "maskdit_a.safetensors", framework="pt") as file:
        tables = {
            name: file.get_tensor(f"weight.model.{name}") for name in ("pos_embed", "decoder_pos_embed")
        }
    config = maskdit_config(64, 1, 4, 2, decoder=DecoderConfig(depth=1, dim=48, head_dim=12))
    network = MaskDiT(config, MASKDIT)
    for name, table in tables.items():
        torch.testing.assert_close(
            network.positions((8, 8), torch.zeros(table.shape[-1]), name), table[0], rtol=0, atol=1e-6
        )
