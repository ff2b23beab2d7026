"""Say in one sentence what is wrong with a setting: which key, what was found, what is valid.

Everything here reads the JSON schema that pydantic makes of a class of settings, so that a limit is written
down once, with the field, and the sentences follow.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

Node = dict[str, Any]
Path = Sequence[str | int]

_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}
_LIMITS = {
    "exclusiveMinimum": "above",
    "minimum": "of at least",
    "exclusiveMaximum": "below",
    "maximum": "of at most",
}


def root(kind: type[BaseModel], data: Any) -> Node:
    """The JSON schema of a class of settings, sections put in their places.

    Args:
        kind: the class.
        data: the settings it is for: where a section is of one of several families, its ``kind`` says which.

    Returns:
        Of such sections the family's own schema, marked ``families``: pydantic's paths name the family too.
    """
    whole = _schema(kind)
    chosen = {key: _chosen(node, data, key) for key, node in whole.get("properties", {}).items()}
    return {**whole, "properties": chosen}


def _chosen(node: Node, data: Any, key: str) -> Node:
    families = node.get("oneOf")
    if families is None:
        return node
    given = data.get(key) if isinstance(data, dict) else None
    kind = given.get("kind") if isinstance(given, dict) else None
    kinds = {id(family): _kinds(family) for family in families}
    family = next((family for family in families if kind in kinds[id(family)]), families[0])
    every = [name for family in families for name in kinds[id(family)]]
    named = {**family["properties"]["kind"], "enum": every}
    named.pop("const", None)
    about = {name: value for name, value in node.items() if name not in ("oneOf", "default")}
    return {**family, **about, "properties": {**family["properties"], "kind": named}, "families": True}


def _kinds(family: Node) -> list[str]:
    kind = family["properties"]["kind"]
    found: list[str] = kind["enum"] if "enum" in kind else [kind["const"]]
    return found


@cache
def _schema(kind: type[BaseModel]) -> Node:
    schema = kind.model_json_schema()

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(each) for each in node]
        if not isinstance(node, dict):
            return node
        whole = {key: inlined(value) for key, value in node.items() if key not in {"$ref", "$defs"}}
        if "$ref" in node:  # what stands beside a reference is about this very place
            return {**inlined(schema["$defs"][node["$ref"].rsplit("/", 1)[1]]), **whole}
        return whole

    found: Node = inlined(schema)
    return found


def is_section(node: Node) -> bool:
    """Whether the node is a mapping with keys of its own, and nothing else."""
    return "properties" in node


def child(node: Node, key: str | int) -> Node | None:
    """The schema below ``node`` at a key or list index; ``None`` where there is none."""
    if "properties" in node:
        return node["properties"].get(key)
    for option in node.get("anyOf", ()):
        if (below := child(option, key)) is not None:
            return below
    if isinstance(node.get("additionalProperties"), dict):
        return node["additionalProperties"]
    if node.get("type") == "array" and isinstance(key, int):
        fixed = node.get("prefixItems", ())
        return fixed[key] if key < len(fixed) else node.get("items")
    return None


def takes_text(node: Node) -> bool:
    """Whether text is a valid kind of value here."""
    return node.get("type") == "string" or any(takes_text(option) for option in node.get("anyOf", ()))


def takes_null(node: Node) -> bool:
    """Whether null is a valid value here."""
    return any(option.get("type") == "null" for option in node.get("anyOf", ()))


def expected(node: Node) -> str:
    """What a value must be, in words: ``a whole number of at least 1 and at most 256``."""
    if "anyOf" in node:
        return ", or ".join(expected(option) for option in node["anyOf"])
    if "enum" in node:
        return _either([str(choice) for choice in node["enum"]])
    if "const" in node:
        return str(node["const"])
    if "properties" in node:
        return f"a mapping with the keys {_listed(list(node['properties']))}"
    if "additionalProperties" in node:
        return f"a mapping of names to {expected(node['additionalProperties'])}"
    if node["type"] == "array":
        return _expected_list(node)
    text = _TYPES[node["type"]]
    limits = [f"{word} {node[key]:g}" for key, word in _LIMITS.items() if key in node]
    if limits:
        text += " " + " and ".join(limits).replace("and of", "and")
    if "multipleOf" in node:
        text += f" and a multiple of {node['multipleOf']}"
    if "pattern" in node:
        text += f" that matches {node['pattern']}"
    if "maxLength" in node:
        text += f" of {node.get('minLength', 0)} to {node['maxLength']} characters"
    return text


def _expected_list(node: Node) -> str:
    if "prefixItems" in node:
        return f"a list of {len(node['prefixItems'])} values, each {expected(node['prefixItems'][0])}"
    least = node.get("minItems", 0)
    return f"a list{f' of at least {least}' if least else ''}, each item {expected(node['items'])}"


def found(value: Any) -> str:
    """A value as it would stand in YAML, cut to a readable length."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def dotted(path: Path) -> str:
    """``("stages", 0, "lr")`` as ``stages.0.lr``."""
    return ".".join(str(part) for part in path)


def nearest(word: str, choices: Sequence[str]) -> str | None:
    """The choice that is spelt most like ``word``, if any is near."""
    matches = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_key(schema: Node, path: Path, data: Any = None) -> str:
    """The sentence for a key that does not exist, with the nearest one that does.

    Args:
        schema: of all settings, see :func:`root`.
        path: the offending key; everything but its last part exists.
        data: the settings it was meant for; where the path ends in a list, they say how long it is.

    Returns:
        A sentence without a final stop.
    """
    *parents, last = path
    node: Node | None = schema
    for part in parents:
        node = child(node, part) if node is not None else None
    keys = list(node.get("properties", ())) if node is not None else []
    if not keys:
        return _no_keys_here(parents, last, data)
    start = f"unknown key {dotted(path)!r}"
    namesakes = [dotted(key) for key in keys_of(schema) if key[-1] == last]
    if not namesakes:
        if (near := nearest(str(last), keys)) is not None:
            return f"{start}; did you mean {dotted([*parents, near])!r}?"
        # Perhaps the whole name is a misspelt one that exists elsewhere.
        known = [name for key in keys_of(schema) if not dotted(path).startswith(name := dotted(key))]
        namesakes = [near] if (near := nearest(dotted(path), known)) is not None else []
    if namesakes:
        return f"{start}; did you mean {_either([repr(name) for name in namesakes])}?"
    where = f"{dotted(parents)} has" if parents else "there are"
    return f"{start}; {where} the keys {_listed(keys)}"


def _no_keys_here(parents: list[str | int], last: str | int, data: Any) -> str:
    start = f"unknown key {dotted([*parents, last])!r}"
    value = data
    for part in parents:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list):
            value = value[int(part)]
    if not isinstance(value, list):
        return f"{start}; {dotted(parents)} is a single value"
    names = [item["name"] for item in value if isinstance(item, dict) and "name" in item]
    named = f" or by name: {_listed(names)}" if names else ""
    return f"{start}; {dotted(parents)} has {len(value)} entries, counted from 0{named}"


def keys_of(schema: Node) -> tuple[tuple[str | int, ...], ...]:
    """Every key, sections included, with the first item of a list of sections standing for all."""

    def walk(node: Node, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
        for key, below in node.get("properties", {}).items():
            yield (*path, key)
            if is_section(below):
                yield from walk(below, (*path, key))
            elif is_section(below.get("items", {})):
                yield from walk(below["items"], (*path, key, 0))

    return tuple(walk(schema, ()))


def explain(kind: type[BaseModel], error: ValidationError, data: Any) -> str:
    """The first of pydantic's complaints as one sentence.

    Args:
        kind: class of the settings.
        error: what pydantic raised.
        data: the settings as they were given to pydantic.

    Returns:
        A sentence without a final stop.
    """
    first = error.errors(include_url=False)[0]
    schema = root(kind, data)
    node, path, value = schema, list[str | int](), data
    loc = list(first["loc"])
    if schema["properties"].get(loc[0] if loc else None, {}).get("families"):
        del loc[1:2]  # pydantic's name of the family
    for part in loc:
        below = child(node, part)
        # Where a value may be of several kinds (a ramp or a list), pydantic's path goes on with the name of
        # a kind and it complains once for each: such a value is judged as a whole.
        if below is None or (isinstance(value, list) and int(part) >= len(value)):
            break
        node = below
        path.append(part)
        value = value.get(part) if isinstance(value, dict) else value[part]
    rest = loc[len(path) :]
    name = dotted(path) or "the configuration"
    match first["type"]:
        case "value_error":  # our own sentences begin with the name of the field
            return ".".join([*map(str, path), str(first["ctx"]["error"])])
        case "extra_forbidden" if len(rest) == 1 and is_section(node):
            return unknown_key(schema, [*path, *rest], data)
        case "missing" if value is None and path:
            return f"{name} is missing; it must be {expected(node)} ({node.get('description', name)})"
        case "finite_number":
            return f"{name} is {found(value)}; it must be finite: {expected(node)}"
    hint = "; put it in quotes" if takes_text(node) and isinstance(value, bool | int | float) else ""
    return f"{name} is {found(value)}; it must be {expected(node)}{hint}"


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
