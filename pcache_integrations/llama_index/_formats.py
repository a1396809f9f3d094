"""Answers of a given form: `response_format`, and what structured prediction asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel

from pcache_core.errors import OptionError
from pcache_core.grammar import close_objects

_ANY_OBJECT: dict[str, Any] = {"type": "object"}


def format_of(output_cls: Any) -> dict[str, Any]:
    """A `response_format` whose answers are objects of a pydantic class."""
    wanted = {"name": output_cls.__name__, "schema": output_cls.model_json_schema()}
    return {"type": "json_schema", "json_schema": wanted}


def schema_of(response_format: object) -> Mapping[str, Any] | None:
    """The JSON schema that an answer must follow; None for free text.

    response_format: as OpenAI takes it, or a pydantic class.
    Raises: OptionError: neither of these.
    """
    if response_format is None:
        return None
    if isinstance(response_format, type) and issubclass(response_format, BaseModel):
        return _closed(response_format.model_json_schema())
    if not isinstance(response_format, Mapping):
        raise OptionError(
            f"response_format must be a mapping or a pydantic class, got {response_format!r}"
        )
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _ANY_OBJECT
    wanted = response_format.get("json_schema")
    schema = wanted.get("schema") if isinstance(wanted, Mapping) else None
    if kind != "json_schema" or not isinstance(schema, Mapping):
        raise OptionError(
            f"response_format={dict(response_format)!r} is none; use {{'type': 'json_schema', "
            "'json_schema': {'name': ..., 'schema': {...}}}, {'type': 'json_object'} or a class"
        )
    assert isinstance(wanted, Mapping)
    return schema if wanted.get("strict") is False else _closed(schema)


def _closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    closed: Mapping[str, Any] = close_objects(schema)
    return closed
