"""As much of JSON Schema as the schemas of the tests use."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from typing import Any

TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}
KNOWN = {
    "$schema", "title", "description", "type", "required", "properties", "additionalProperties",
    "items", "minItems", "enum", "const", "pattern", "format", "minimum", "exclusiveMinimum",
    "exclusiveMaximum",
}  # fmt: skip


def faults(value: Any, schema: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """What is wrong with a value, by its place."""
    assert set(schema) <= KNOWN, f"{where}: {set(schema) - KNOWN} is not checked here"
    kinds = schema.get("type")
    if kinds is not None:
        kinds = [kinds] if isinstance(kinds, str) else kinds
        allowed = tuple(t for kind in kinds for t in TYPES[kind])
        if not isinstance(value, allowed) or (isinstance(value, bool) and "boolean" not in kinds):
            yield f"{where}: {value!r} is not of type {kinds}"
            return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is not one of {schema['enum']}"
    if "const" in schema and value != schema["const"]:
        yield f"{where}: {value!r} is not {schema['const']}"
    if isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield f"{where}: {value!r} does not match {schema['pattern']}"
        if schema.get("format") == "date":
            datetime.date.fromisoformat(value)
    if isinstance(value, int | float):
        if value < schema.get("minimum", value):
            yield f"{where}: {value} is too small"
        if not schema.get("exclusiveMinimum", -1) < value < schema.get("exclusiveMaximum", 1e300):
            yield f"{where}: {value} is out of range"
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{where}: too few items"
        for i, item in enumerate(value):
            yield from faults(item, schema.get("items", {}), f"{where}/{i}")
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        yield from (
            f"{where}: {k} is missing" for k in schema.get("required", []) if k not in value
        )
        for key, item in value.items():
            rest = schema.get("additionalProperties", True)
            if key in properties:
                yield from faults(item, properties[key], f"{where}/{key}")
            elif rest is False:
                yield f"{where}: {key} is not known"
            elif isinstance(rest, dict):
                yield from faults(item, rest, f"{where}/{key}")
