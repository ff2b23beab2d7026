"""Options that several commands on data share, and what they make of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from shoestring.config import DataConfig
from shoestring.runtime import ExitCode, UserError, say

StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="folder or URL of a store")]
OutStore = Annotated[str, typer.Option("--out", help="folder or URL of the store to make")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps")]
Codec = Annotated[
    str | None,
    typer.Option(help="pixels, autoencoder-kl, autoencoder-dc, autoencoder-tiny or taef2"),
]
CodecPath = Annotated[str | None, typer.Option(help="folder or hub name of the codec's weights")]
Encoder = Annotated[str | None, typer.Option(help="hashing, minilm, clip, t5 or none")]
EncoderPath = Annotated[str | None, typer.Option(help="folder or hub name of the encoder's weights")]


def choice(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    """The value of an option, if it is one of some words."""
    if value not in allowed:
        raise UserError(f"{option} is {value!r}; choose from {', '.join(allowed)}")
    return value


def refuse(options: Mapping[str, object], why: str, given: str) -> None:
    """Say which of some options has no use.

    Args:
        options: their values by name; ``None`` where it was not given.
        why: in words.
        given: what makes them useless.

    Raises:
        UserError: if one was given.
    """
    for option, value in options.items():
        if value is not None:
            raise UserError(f"{option} was given with {given}, {why}; leave one of them out")


def data_config(values: dict[str, Any], names: Mapping[str, str] | None = None) -> DataConfig:
    """Settings of the data from options, whose mistakes are said of the options."""
    from pydantic import ValidationError

    try:
        return DataConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        option = (names or {}).get(field, "--" + field.replace("_", "-"))
        raise UserError(f"{option} is {first['input']!r}: {first['msg'].lower()}") from error


@contextmanager
def resumable() -> Iterator[None]:
    """Around a job that loses nothing when somebody presses Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        say(Console(stderr=True), "shoestring: interrupted; the same command goes on from here")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
