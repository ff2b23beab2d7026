"""Image-to-text models of transformers, tiny and random, write captions into a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raw_stores import make_raw
from shoestring.data.caption import caption
from shoestring.encoders.captions import ImageToText
from shoestring.runtime import UserError

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
WORDS = [*SPECIAL, "a", "photo", "of", "red", "green", "blue", "cat", "dog"]


def save_tokenizer(folder: Path) -> None:
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def draw_weights(model: torch.nn.Module) -> None:
    """Random weights that never end a caption."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith(("cls.predictions.bias", "cls.predictions.decoder.bias")):
            parameter.data[: len(SPECIAL)] = -100


def blip(folder: Path) -> str:
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    save_tokenizer(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**sizes, **tokens, "vocab_size": len(WORDS), "encoder_hidden_size": 16},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(1)
    model = BlipForConditionalGeneration(config)
    draw_weights(model)
    model.save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    BlipProcessor(images, BertTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return str(folder)


def encoder_decoder(folder: Path) -> str:
    from transformers import (
        BertConfig,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessorPil,
    )

    save_tokenizer(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**sizes, image_size=32, patch_size=16),
        BertConfig(**sizes, vocab_size=len(WORDS), is_decoder=True, add_cross_attention=True),
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    torch.manual_seed(1)
    model = VisionEncoderDecoderModel(config)
    draw_weights(model)
    model.generation_config.decoder_start_token_id = 1
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


CHAT = """{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}\
<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"""


def llava(folder: Path) -> str:
    """One that chats."""
    from transformers import (
        BertTokenizer,
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    save_tokenizer(folder)
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=16),
        text_config=LlamaConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=2),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(config)
    draw_weights(model)
    model.lm_head.weight.data[[*range(len(SPECIAL)), len(WORDS)]] = 0  # words are likelier
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return str(folder)


def pictures(count: int) -> list[Image.Image]:
    draw = np.random.RandomState(0)
    return [Image.fromarray(draw.randint(0, 256, (20 + 4 * i, 30, 3), np.uint8)) for i in range(count)]


@pytest.mark.parametrize("make", [blip, encoder_decoder])
def test_a_model_writes_captions_of_its_words(make: object, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")  # type: ignore[operator]
    model = ImageToText(folder, max_tokens=6)
    some = pictures(3)
    texts = model(some)
    assert len(texts) == 3
    for text in texts:
        assert set(text.split()) <= set(WORDS)
        assert 0 < len(text.split()) <= 6
    assert model(some) == texts
    assert model(some[1:2]) == texts[1:2]
    assert model.origin == f"{folder}, at most 6 tokens, fp32"


def test_one_that_chats_answers_what_it_is_asked(tmp_path: Path) -> None:
    model = ImageToText(llava(tmp_path / "model"), max_tokens=4)
    assert model.chats
    some = pictures(3)
    texts = model(some)
    assert len(texts) == 3
    assert model(some[1:2]) == texts[1:2]
    assert [model([picture], "a cat of red")[0] for picture in some] == model(some, "a cat of red") != texts


def test_captions_begin_with_the_prompt(tmp_path: Path) -> None:
    model = ImageToText(blip(tmp_path / "model"), prompt="a photo of", max_tokens=4)
    assert all(text.startswith("a photo of") for text in model(pictures(2)))
    assert "prompt 'a photo of'" in model.origin


def test_a_store_gets_them(tmp_path: Path) -> None:
    folder = blip(tmp_path / "model")
    raw = make_raw(tmp_path / "raw", rows=6)
    model = ImageToText(folder, max_tokens=5)
    store = caption(raw, lambda: model, "blip", model.origin, batch=4)
    texts = store.texts.to_table()["text"].to_pylist()
    rows = store.records.to_table(columns=["caption_blip"])["caption_blip"].to_pylist()
    assert all(set(texts[row].split()) <= set(WORDS) for (row,) in rows)


def test_a_wrong_name_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--captioner is '.*nothing'"):
        ImageToText(str(tmp_path / "nothing"))
    folder = Path(blip(tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load an image-to-text model of transformers"):
        ImageToText(str(folder))
