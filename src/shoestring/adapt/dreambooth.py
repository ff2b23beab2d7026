"""DreamBooth: a few pictures of one subject, a rare word that comes to mean it, and the class kept as it was.

Pictures of the subject ("a TOKEN CLASS") and pictures of the class that the model itself draws before ("a
CLASS": prior preservation) are two stores that the ordinary training loop mixes. Their proportion is the
weight of the prior: with 1 each counts alike.

Source: Ruiz et al., arXiv 2208.12242, sections 3.2 and 3.3. There the weight multiplies the loss of the class
pictures, which a batch has as many of; here it is their number, in expectation the same gradient.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shoestring.adapt.recipe import fine_tuning_logging, fine_tuning_stage
from shoestring.config import DreamBoothConfig, LoRAConfig, OptimizerConfig, RunConfig, from_json
from shoestring.data.folder import SUFFIXES
from shoestring.data.ingest import ingest
from shoestring.data.pixels import Unusable, decode
from shoestring.data.readers import open_reader
from shoestring.evaluation.digests import file_digest
from shoestring.evaluation.drawing import draw, picture_file, wishes
from shoestring.interfaces import WordEncoder
from shoestring.models.files import build_network, find_model, read_header
from shoestring.runtime import UserError, atomic_write, write_text
from shoestring.sampling.generate import Pipeline
from shoestring.training.folder import MACHINE, locked, remember
from shoestring.training.stores import prepare_own

LEAST, MOST = 3, 10
"""Pictures of a subject."""
AT_ONCE = 32
"""Class pictures drawn together."""
SUBJECT, CLASS = "subject", "class"


@dataclass(frozen=True)
class Training:
    """How a subject is learned."""

    lora: LoRAConfig | None = None
    """``None`` = all weights."""
    prior: int = 64
    """Pictures of the class, drawn by the model itself; 0 = none."""
    prior_weight: float = 1.0
    """How many samples of the class come to one of the subject."""
    nimg: int = 1_600
    batch: int = 16
    lr: float = 1.5e-4
    seed: int = 0


def subject_files(folder: Path) -> list[Path]:
    """The pictures of a subject.

    Args:
        folder: holds 3 to 10 of them, and nothing else that is a picture.

    Returns:
        By name.

    Raises:
        UserError: if there are fewer or more, or one of them cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give that of {LEAST} to {MOST} pictures of the subject")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not LEAST <= len(files) <= MOST:
        raise UserError(
            f"{folder} holds {len(files)} pictures; a subject is learned from {LEAST} to {MOST}, all of "
            "them of that subject"
        )
    for path in files:
        try:
            decode(path)
        except Unusable as error:
            raise UserError(
                f"{path} cannot be read as a picture ({error}); replace it or take it away"
            ) from error
    return files


def choose_token(encoder: WordEncoder, token: str | None) -> str:
    """The word for the subject.

    Args:
        encoder: of the model.
        token: what the user wants; ``None`` = the encoder's rarest word without a meaning.

    Returns:
        A word that the encoder reads as one piece.

    Raises:
        UserError: if it splits the word, or does not know it.
    """
    rare = encoder.rare_words(5)
    if token is None:
        if not rare:
            raise UserError(f"the vocabulary of {encoder.name} has no rare short word; name one with --token")
        return rare[0]
    pieces = encoder.pieces(token)
    if len(pieces) == 1 and pieces[0] in (token, token.lower()):
        return token
    read = " + ".join(pieces) or "nothing"
    raise UserError(
        f"--token is {token!r}, which the text encoder {encoder.name} reads as {read}; take a word that is "
        f"one piece, such as {', '.join(rare)}"
    )


def check_base(base: Path) -> Path:
    """The model file of a base that can learn a subject.

    Args:
        base: run folder, checkpoint folder or model file.

    Returns:
        The file.

    Raises:
        UserError: if it cannot be read, knows no words, or is itself adapted.
    """
    path = find_model(base)
    config = read_header(path).config
    if config.model.condition != "text":
        raise UserError(
            f"{path} has model.condition={config.model.condition}; DreamBooth teaches a model a word, so it "
            "needs one that draws from text"
        )
    if config.superres is not None:
        raise UserError(f"{path} enlarges pictures; DreamBooth needs a model that draws from words")
    if config.distill is not None:
        raise UserError(
            f"{path} is distilled ({config.distill.method}) and would lose its few steps; give the model "
            "that it was made from"
        )
    if config.lora is not None:
        raise UserError(
            f"{path} has LoRA factors beside its weights; put them into the weights first, with shoestring "
            "adapt lora-file and shoestring adapt merge"
        )
    return path


def dreambooth_recipe(
    base: Path, subject: DreamBoothConfig, training: Training, name: str, folder: Path
) -> RunConfig:
    """The recipe that teaches a pretrained model a subject.

    Data are two stores of the run folder; captions are never dropped, so that the unconditional prediction is
    not taught the subject. AdamW without weight decay; codec, text encoder and process are the base's.

    Args:
        base: run folder, checkpoint folder or model file.
        subject: its words.
        training: how.
        name: of the run.
        folder: run folder.

    Returns:
        A recipe that ``shoestring train`` can run as well, once :func:`prepare_pictures` has run.

    Raises:
        UserError: as :func:`check_base`; or if LoRA's targets or rank do not fit the network.
    """
    path = check_base(base)
    header = read_header(path)
    config, side, nimg, batch = header.config, header.facts.resolution, training.nimg, training.batch
    own = {"resolution": side, "stores": (), "min_side": None, "ema_decay": None}
    stage = fine_tuning_stage(header, "dreambooth", nimg, batch, training.lr) | own
    stores = [{"path": str(store_of(folder, SUBJECT)), "weight": 1.0}]
    if training.prior:
        stores.append({"path": str(store_of(folder, CLASS)), "weight": training.prior_weight})
    data = {
        "source": "store",
        "path": None,
        "stores": stores,
        "mix": "proportion",
        "captions": ("source",),
        "max_captions": None,
        "buckets": 1,
        "held_out": 0.0,
        "flip": False,
        "caption_drop": 0.0,
    }
    values = config.model_dump() | {
        "name": name,
        "seed": training.seed,
        "data": config.data.model_dump() | data,
        "stages": [stage],
        "initial_weights": str(path.resolve()),
        "optimizer": OptimizerConfig(weight_decay=0.0).model_dump(),
        "power_ema": (),
        "lora": None if training.lora is None else training.lora.model_dump(),
        "dreambooth": subject.model_dump(),
        "logging": fine_tuning_logging(config, nimg, batch, 4)
        | {"milestone_nimg": None, "prompts": (subject.subject_prompt, subject.class_prompt)},
    }
    made = from_json(json.dumps(values), "the recipe of DreamBooth")
    if made.lora is not None:
        build_network(made)  # targets that are not there are said before anything is drawn
    return made


def store_of(folder: Path, which: str) -> Path:
    """The store of the subject's or of the class's pictures in a run folder."""
    return folder.resolve() / "stores" / which


def prepare_pictures(
    config: RunConfig,
    folder: Path,
    pictures: Path,
    pipeline: Pipeline,
    prior: int,
    on_drawn: Callable[[int], object] = lambda done: None,
) -> None:
    """Put the pictures that a run learns from into its folder: the subject's, and those of the class.

    What is there already is kept, so an interrupted call goes on.

    Args:
        config: of the run.
        folder: of the run.
        pictures: folder of the subject's pictures.
        pipeline: of the base; it draws the class.
        prior: pictures of the class.
        on_drawn: called with their number so far.

    Raises:
        UserError: if the folder was begun with other pictures, words or weights.
    """
    subject, stage = config.dreambooth, config.stages[0]
    assert subject is not None
    assert config.initial_weights is not None
    files = subject_files(pictures)
    with locked(folder):
        begun = _digest(config, files, prior)
        if remember(folder / MACHINE, "dreambooth", lambda: begun) != begun:
            raise UserError(
                f"{folder} was begun with other pictures, words, seed or base; choose another folder with "
                "--out, or delete that one"
            )
        own = folder / "pictures" / SUBJECT
        for path in files:
            content = path.read_bytes()
            atomic_write(own / path.name, lambda file, content=content: file.write(content))  # type: ignore[misc]
        _caption(own, [path.name for path in files], subject.subject_prompt)
        kinds = [SUBJECT]
        if prior:
            drawn, wanted = folder / "pictures" / CLASS, wishes([subject.class_prompt] * prior, [config.seed])
            draw(pipeline, drawn, wanted, pipeline.config.sampling, min(prior, AT_ONCE), on_done=on_drawn)
            names = [picture_file(drawn, wish).relative_to(drawn).as_posix() for wish in wanted]
            _caption(drawn, names, subject.class_prompt)
            kinds.append(CLASS)
        for kind in kinds:
            store = store_of(folder, kind)
            reader = open_reader(f"folder:{folder / 'pictures' / kind}")
            raw = ingest(reader, str(store.with_name(f"{kind}-pictures")))
            prepare_own(config, stage, pipeline.codec, pipeline.text_encoder, raw, store)


def _caption(folder: Path, names: list[str], caption: str) -> None:
    """Write the caption file of a folder, where it says something else."""
    text = "".join(json.dumps({"file_name": name, "caption": caption}) + "\n" for name in names)
    path = folder / "metadata.jsonl"
    if not path.is_file() or path.read_text() != text:
        write_text(path, text)


def _digest(config: RunConfig, files: list[Path], prior: int) -> str:
    """Of all that the pictures in the run folder are made of."""
    assert config.initial_weights is not None
    assert config.dreambooth is not None

    def parts() -> Iterator[str]:
        assert config.initial_weights is not None
        assert config.dreambooth is not None
        yield file_digest(Path(config.initial_weights))
        yield config.dreambooth.model_dump_json()
        yield f"{config.seed} {prior} {config.stages[0].resolution}"
        for path in files:
            yield f"{path.name} {file_digest(path)}"

    return hashlib.blake2b("\n".join(parts()).encode(), digest_size=16).hexdigest()
