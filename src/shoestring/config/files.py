"""Settings as YAML with comments, as JSON, and changed by ``key=value``.

YAML is read with its simple types only, and a little more kindly than YAML 1.1 does: ``1e-3`` is a number,
``1e6`` a whole one, dates and ``12:30`` stay text. A key given twice is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, overload

import yaml
from pydantic import ValidationError

from shoestring.config import explain
from shoestring.config.base import Frozen
from shoestring.config.explain import Node
from shoestring.config.schema import RunConfig
from shoestring.runtime import UserError

Settings = TypeVar("Settings", bound=Frozen)

_MAX_BYTES = 1_000_000
_WIDTH = 110
_TAG = "tag:yaml.org,2002:"


# ---------------------------------------------------------------------------------------- reading YAML


class _Loader(yaml.SafeLoader):
    """The YAML types that settings are made of, and no others."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (as PyYAML declares it)
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping; a key given twice would silently lose one of its values."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and isinstance(key_node, yaml.ScalarNode):
                problem = f"the key {key_node.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if isinstance(key_node, yaml.ScalarNode):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes scalars so that ``_Loader`` reads them back as they were."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (as PyYAML declares it)


def _construct_number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    text = node.value.replace("_", "")
    if ".inf" in text.lower() or ".nan" in text.lower():
        return float(text.lower().replace(".", ""))
    if re.fullmatch(r"[-+]?[0-9]{1,300}", text):
        return int(text)
    value = float(text)
    # 1e6 images is a whole number; 16.0 stays what it looks like.
    whole = "e" in text.lower() and math.isfinite(value) and abs(value) <= 2**53 and value == int(value)
    return int(value) if whole else value


_INT = r"[-+]?[0-9][0-9_]*"
_FLOAT = r"""[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
    |[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"""
for _tool in (_Loader, _Dumper):
    _words = r"true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF"
    _tool.add_implicit_resolver(_TAG + "bool", re.compile(rf"(?:{_words})\Z"), list("tTfFyYnNoO"))
    _tool.add_implicit_resolver(_TAG + "null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
    _tool.add_implicit_resolver(_TAG + "int", re.compile(rf"(?:{_INT})\Z"), list("-+0123456789"))
    _tool.add_implicit_resolver(_TAG + "float", re.compile(rf"(?:{_FLOAT})\Z", re.X), list("-+0123456789."))
    _tool.add_implicit_resolver(_TAG + "merge", re.compile(r"<<\Z"), ["<"])
for _kind in ("null", "bool", "str", "seq", "map"):
    _Loader.add_constructor(_TAG + _kind, yaml.SafeLoader.yaml_constructors[_TAG + _kind])
_Loader.add_constructor(_TAG + "int", _construct_number)
_Loader.add_constructor(_TAG + "float", _construct_number)
_Loader.add_constructor(None, yaml.SafeLoader.construct_undefined)  # type: ignore[type-var]


def _load(text: str) -> Any:
    """Parse YAML into plain values; a ``ValueError`` says what is wrong and in which line."""
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506  (a subclass of SafeLoader)
        json.dumps(value)  # refuses a list that contains itself
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(f"the character {chr(error.character)!r} is not allowed in YAML") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError("it contains itself, or a number that is too long") from error
    return value


@overload
def parse_yaml(text: str, source: str = ...) -> RunConfig: ...
@overload
def parse_yaml(text: str, source: str, kind: type[Settings]) -> Settings: ...


def parse_yaml(text: str, source: str = "the configuration", kind: type[Any] = RunConfig) -> Any:
    """Read settings from YAML.

    Args:
        text: the YAML.
        source: what to call it in an error, e.g. its file name.
        kind: class of the settings.

    Returns:
        The settings; what the text leaves out has its default.

    Raises:
        UserError: one sentence that names the key or line, what was found and what is valid.
    """
    try:
        data = _load(text)
    except ValueError as error:
        raise UserError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{source} holds {explain.found(data)}; it must be a mapping of settings, key: value")
    return _validate(kind, data, f"{source}: ")


@overload
def load_yaml(path: str | Path) -> RunConfig: ...
@overload
def load_yaml(path: str | Path, kind: type[Settings]) -> Settings: ...


def load_yaml(path: str | Path, kind: type[Any] = RunConfig) -> Any:
    """Read settings from a YAML file.

    Args:
        path: the file.
        kind: class of the settings.

    Returns:
        The settings.

    Raises:
        UserError: if the file is absent, not text, not YAML, or a setting is wrong.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; a configuration is YAML below 1 MB")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file; a configuration is YAML in UTF-8") from error
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the configuration {path}: {reason}") from error
    return parse_yaml(text, str(path), kind)


def from_json(text: str, source: str = "the checkpoint's configuration") -> RunConfig:
    """Read a run's settings from the JSON that ``RunConfig.model_dump_json`` wrote.

    Args:
        text: the JSON.
        source: what to call it in an error.

    Returns:
        The settings.

    Raises:
        UserError: if it is not JSON or a setting is wrong.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not valid JSON") from error
    if not isinstance(data, dict):
        raise UserError(f"{source} holds {explain.found(data)}; it must be a JSON object")
    return _validate(RunConfig, data, f"{source}: ")


def _validate(kind: type[Settings], data: dict[Any, Any], prefix: str = "") -> Settings:
    """Check plain values strictly (as JSON: lists are tuples, but "12" and true are no numbers)."""
    try:
        return kind.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise UserError(prefix + explain.explain(kind, error, json.loads(json.dumps(data)))) from error


# ------------------------------------------------------------------------------------------- overrides


def apply_overrides(config: Settings, overrides: Sequence[str]) -> Settings:
    """Change settings by ``key.sub=value``, the later ones winning.

    Values are YAML (``1e-3``, ``null``, ``[0.5, 1.0]``); where a setting is text it is taken as it stands.
    A stage is addressed by its number from 0 or by its name; a mapping given for a section changes the keys
    it names and leaves the others.

    Args:
        config: the settings to start from.
        overrides: e.g. ``["model.depth=4", "stages.0.lr=1e-3", "stages.pretrain.mask_ratio=0.5"]``.

    Returns:
        New settings, checked as a whole after all changes.

    Raises:
        UserError: one sentence that names the key, what was found and what is valid.
    """
    if not overrides:
        return config
    data = config.model_dump(mode="json")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"cannot read {override!r}; write key=value, for example model.depth=4")
        _override(explain.root(type(config), data), data, key.strip(), text)
    return _validate(type(config), data)


def _override(schema: Node, data: dict[str, Any], key: str, text: str) -> None:
    node, target, path = schema, data, list[str | int]()
    *parents, last = key.split(".")
    for name in parents:
        node, part = _step(schema, node, target, path, name, data)
        path.append(part)
        if target[part] is None and any(explain.is_section(option) for option in node.get("anyOf", ())):
            where = explain.dotted(path)
            raise UserError(
                f"{where} is null, so {key} cannot be changed alone; give the whole of it: {where}={{...}}"
            )
        target = target[part]
    node, part = _step(schema, node, target, path, last, data)
    value = _read_value(text, node, key)
    if last == "kind" and value != target.get("kind") and _family(schema, data, parents, value):
        raise UserError(
            f"{key}={text.strip()} is another family of networks, with settings of its own; begin with a "
            "recipe of that family (shoestring recipes), or give the whole section in a YAML file"
        )
    _set(target, part, value, node)


def _family(schema: Node, data: Any, parents: list[str], kind: Any) -> bool:
    """Whether a kind belongs to another family than the section at some key has now."""
    if len(parents) != 1 or not schema["properties"].get(parents[0], {}).get("families"):
        return False
    now = schema["properties"][parents[0]]["properties"].keys()
    changed = {**data, parents[0]: {"kind": kind}}
    known = kind in schema["properties"][parents[0]]["properties"]["kind"]["enum"]
    other = explain.root(RunConfig, changed)["properties"][parents[0]]["properties"].keys()
    return known and now != other


def _step(
    schema: Node, node: Node, target: Any, path: list[str | int], name: str, data: Any
) -> tuple[Node, Any]:
    """One step down a dotted key: the schema there, and the key or list index that leads to it."""
    part: str | int = name
    if isinstance(target, list):
        names = [item.get("name") for item in target if isinstance(item, dict)]
        if name in names:
            part = names.index(name)
        elif name.isdecimal() and int(name) < len(target):
            part = int(name)
    below = explain.child(node, part)
    if below is None or (isinstance(target, list) and isinstance(part, str)):
        raise UserError(explain.unknown_key(schema, [*path, name], data))
    return below, part


def _read_value(text: str, node: Node, key: str) -> Any:
    if explain.takes_text(node) and not text.lstrip().startswith(("'", '"')):
        is_null = explain.takes_null(node) and text.strip().lower() in ("", "~", "null")
        return None if is_null else text.strip()
    try:
        return _load(text)
    except ValueError as error:
        raise UserError(f"{key} is {text!r}, which cannot be read: {error}") from error


def _set(target: Any, part: Any, value: Any, node: Node) -> None:
    if explain.is_section(node) and isinstance(value, dict) and isinstance(target[part], dict):
        for key, below in value.items():
            schema = explain.child(node, key)
            if schema is None:
                target[part][key] = below  # the check of the whole names it
            else:
                target[part].setdefault(key, None)
                _set(target[part], key, below, schema)
    else:
        target[part] = value


# ---------------------------------------------------------------------------------------- writing YAML


def to_yaml(config: Frozen, header: str = "") -> str:
    """All settings as YAML, each explained by a comment (in lists of stages, once).

    Args:
        config: the settings.
        header: text for the top, as comment lines.

    Returns:
        YAML that :func:`parse_yaml` reads back to an equal ``config``.
    """
    texts = header.replace("\t", "    ").splitlines()
    # YAML allows no control characters, not even in a comment.
    lines = ["# " + "".join(c if c.isprintable() else "?" for c in line) for line in texts]
    lines = [line.rstrip() for line in lines]
    if lines:
        lines.append("")
    data = config.model_dump(mode="json")
    lines += _section(data, explain.root(type(config), data), 0, comments=True)
    return "\n".join(lines) + "\n"


def _section(data: dict[str, Any], node: Node, indent: int, comments: bool) -> list[str]:
    """The lines of one mapping; the comments behind its plain values stand in one column."""
    pad = " " * indent
    properties: dict[str, Node] = node["properties"]
    plain = {key: _flow(data[key]) for key, below in properties.items() if not _is_block(below, data[key])}
    column = max((len(key) + 2 + len(text) for key, text in plain.items() if len(text) < 40), default=0)
    lines: list[str] = []
    for key, below in properties.items():
        comment = f"# {below['description']}" if comments else ""
        if key in plain:
            line = f"{pad}{key}: {plain[key]}"
            if comment and indent + column + 2 + len(comment) <= _WIDTH and len(line) <= indent + column:
                line = f"{line:<{indent + column}}  {comment}"
            elif comment:
                lines.append(pad + comment)
            lines.append(line)
            continue
        if not indent and lines:
            lines.append("")
        lines.append(f"{pad}{key}:  {comment}".rstrip())
        if explain.is_section(below):
            lines += _section(data[key], below, indent + 2, comments)
        else:
            lines += _list(data[key], below["items"], indent + 2, comments)
    return lines


def _is_block(node: Node, value: Any) -> bool:
    """Sections, lists of sections and lists too long for a line take lines of their own."""
    if explain.is_section(node):
        return True
    if not isinstance(value, list) or not value:
        return False
    return explain.is_section(node.get("items", {})) or ("items" in node and len(_flow(value)) > _WIDTH - 20)


def _list(values: list[Any], node: Node, indent: int, comments: bool) -> list[str]:
    pad = " " * indent
    if not explain.is_section(node):
        return [f"{pad}- {_flow(value)}" for value in values]
    lines: list[str] = []
    for i, value in enumerate(values):
        item = _section(value, node, indent + 2, comments and i == 0)
        if item[0].lstrip().startswith("#"):  # a comment above the first key stays above the dash
            lines.append(pad + item.pop(0).lstrip())
        lines += [f"{pad}- {item[0].lstrip()}", *item[1:]]
    return lines


def _flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, str) and not _is_plain(value):
        # Double quotes have an escape for everything, so the text always fits on one line.
        return str(_dump(value, default_style='"'))
    if isinstance(value, list):
        return f"[{', '.join(_flow(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    return _dump(value)


def _is_plain(text: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./ -]*(?<! )", text)) and _dump(text) == text


def _dump(value: Any, default_style: str | None = None) -> str:
    text = yaml.dump(value, Dumper=_Dumper, default_style=default_style, allow_unicode=True, width=math.inf)
    return str(text).removesuffix("\n").removesuffix("\n...")
