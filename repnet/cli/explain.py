"""`python train.py --explain KEY`: what a part of the config means and takes."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

from hydra.errors import HydraException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from repnet.cli import command
from repnet.config import Training
from repnet.errors import InputError
from repnet.spec import CONFIGS, Target, choices, resolve_targets, unknown_name
from repnet.terminal import print_table


def main(arguments: Sequence[str]) -> None:
    """Explain the key behind `--explain`, with the choices of the other arguments.

    Without a key, all keys are listed.
    """
    before, after = list(arguments), []
    position = before.index("--explain")
    before, after = before[:position], before[position + 1 :]
    key = after.pop(0).partition(".")[0] if after and "=" not in after[0] else ""
    try:
        _explain(key, command.base_config("train", [*before, *after]))
    except (HydraException, InputError) as error:
        print(f"error: {command.message_of(error)}", file=sys.stderr)
        sys.exit(command.BAD_INPUT)


def _explain(key: str, config: dict[str, Any]) -> None:
    fields = Training.model_fields
    if not key:
        keys = [(name, field.description or "") for name, field in fields.items()]
        _print("The keys of a training; --explain KEY says more", keys)
        return
    if key not in fields:
        raise InputError(unknown_name("key", key, list(fields)))
    schema = Training.model_json_schema()
    own = schema["properties"][key]
    print(f"{key}: {own['description']}")
    value = config.get(key)
    if names := choices(key):
        _print(f"\nChoices, {key}=NAME", [(name, _header(key, name)) for name in names])
    found = resolve_targets({key: value})
    for target in found:
        if target.path.count(".") <= 1:
            part = schema["$defs"].get(_definition(own), {}).get("properties", {})
            _print_target(target, part)
    if not found and not choices(key):
        if not isinstance(value, dict):
            print(f"It is {_shown(value)}; {_kind(own)}")
        rows = []
        for name, part in schema["$defs"].get(_definition(own), {}).get("properties", {}).items():
            now = f"={_shown(value[name])}" if isinstance(value, dict) else ""
            rows.append((f"{key}.{name}{now}", _takes(part)))
        _print("", rows)


def _print_target(target: Target, part: dict[str, Any]) -> None:
    """Print the arguments that a config gives, with what the schema and the target say of them."""
    parameters = inspect.signature(target.call).parameters
    meanings = _meanings(target.call)
    rows = []
    for name in target.arguments:
        takes = _takes(part[name]) if name in part else _annotation(parameters.get(name))
        if "description" not in part.get(name, {}) and name in meanings:
            takes = f"{takes}: {meanings[name]}" if takes else meanings[name]
        rows.append((f"{target.path}.{name}={_shown(target.arguments[name])}", takes))
    _print(f"\n{target.path} is {target.name}", rows)
    known = {*target.arguments, "args", "kwargs", "params"}
    if others := [name for name in parameters if name not in known]:
        print(f"It also takes, as +{target.path}.NAME=VALUE: {', '.join(others)}")


def _definition(schema: dict[str, Any]) -> str:
    """Return the name of the definition that a field refers to, or ''."""
    found = re.search(r"#/\$defs/(\w+)", str(schema))
    return found[1] if found else ""


def _takes(schema: dict[str, Any]) -> str:
    """Return the type, the range and the description of a field."""
    kind = _kind(schema)
    return f"{kind}: {schema['description']}" if "description" in schema else kind


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(_kind(part) for part in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    kind = {"string": "text", "boolean": "true or false", "array": "list"}.get(
        schema.get("type", ""), schema.get("type", "group of keys")
    )
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    limits = [f" {sign} {schema[name]}" for name, sign in bounds.items() if name in schema]
    return kind + ",".join(limits)


def _annotation(parameter: inspect.Parameter | None) -> str:
    if parameter is None or parameter.annotation is parameter.empty:
        return ""
    text = parameter.annotation
    return text if isinstance(text, str) else inspect.formatannotation(text)


def _meanings(call: Any) -> dict[str, str]:
    """Return the first sentence about each argument in a docstring of Google's or torch's style."""
    text = "\n".join(inspect.getdoc(part) or "" for part in (call.__init__, call))
    found = re.findall(r"^ {4}(\w+)(?: \(.*?\))?: *(.+(?:\n {5,}.+)*)", text, re.MULTILINE)
    return {name: re.split(r"[.;] |\.$", " ".join(said.split()))[0] for name, said in found}


def _header(group: str, name: str) -> str:
    """Return the first sentence of the comment that a file of the group begins with."""
    lines = (CONFIGS / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith("# @") and not line.startswith("#   "):
            comment.append(line.removeprefix("#").strip())
    return re.split(r"\. |: (?=python)|\.$", " ".join(comment))[0]


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _print(title: str, rows: list[tuple[str, str]]) -> None:
    if title:
        print(title)
    table = Table(box=None, show_header=False, padding=(0, 0, 0, 2))
    for name, text in rows:
        table.add_row(escape(name), escape(text))
    print_table(table, console=Console(highlight=False))
