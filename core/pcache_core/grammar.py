"""What an answer may consist of: a JSON schema or a grammar, checked when it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pcache_core.errors import OptionError

# One way to write every document, as `json.dumps` does: no free whitespace to get lost in.
JSON_STYLE: dict[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
_ANY_OBJECT: dict[str, Any] = {"type": "object"}

_MAPS = ("properties", "$defs", "definitions", "patternProperties")
_DATA = ("enum", "const", "default", "examples", "allOf", "required")
_OPENERS = ("additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "$ref")


@dataclass(frozen=True, slots=True)
class Grammar:
    """The texts that an answer may be.

    source: in llguidance's own notation; made by `json` and `lark`.

    Raises: OptionError: no such grammar can be followed, with llguidance's reason.
    """

    source: str

    def __post_init__(self) -> None:
        from llguidance import LLMatcher  # a fifth of a second that most programs need not spend

        if not isinstance(self.source, str):
            raise OptionError(f"a grammar is text, got {type(self.source).__name__}")
        is_error, reasons = LLMatcher.validate_grammar_with_warnings(self.source)
        if is_error:
            raise OptionError(f"the grammar can't be followed: {reasons[0].strip()}")

    @classmethod
    def json(cls, schema: Mapping[str, Any] | None = None) -> Grammar:
        """JSON that is valid for a schema, properties in its order; None takes any object.

        Written as `json.dumps` writes it. What the schema says about a document's length, such as
        `maxItems`, is kept; where it says nothing, a request's `max_tokens` ends the document.

        Raises: OptionError: no JSON schema, or one with a keyword that can't be promised.
        """
        if schema is not None and not isinstance(schema, Mapping):
            raise OptionError(
                f"a JSON schema must be a mapping, got {type(schema).__name__}; "
                'for example {"type": "object"}'
            )
        source = _json_source(_ANY_OBJECT if schema is None else schema)
        try:
            return cls(source)
        except OptionError as error:
            raise OptionError(
                f"{error}; describe that field in another way, such as a list for a set, "
                "or str for bytes"
            ) from None

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """A grammar in llguidance's dialect of Lark, where `%json {...}` stands for a schema.

        Raises: OptionError: it can't be read.
        """
        from llguidance import LLMatcher

        if not isinstance(text, str):
            raise OptionError(f"a Lark grammar is text, got {type(text).__name__}")
        return cls(LLMatcher.grammar_from_lark(text))


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return the schema as a part of a Lark grammar. Raises: OptionError: it is no JSON."""
    return f"%json {_dump({**schema, 'x-guidance': JSON_STYLE})}"


def close_objects(schema: Any) -> Any:
    """Return the schema with no more properties than it names, where it leaves that open.

    A model that may invent properties will. Parts of an `allOf` stay open, for each describes
    the same object.
    """
    if isinstance(schema, list):
        return [close_objects(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed = {
        key: value if key in _DATA else _close_named(key, value) for key, value in schema.items()
    }
    is_open = not any(key in schema for key in _OPENERS)
    return (
        {**closed, "additionalProperties": False} if is_open and "properties" in schema else closed
    )


def _close_named(key: str, value: Any) -> Any:
    if key in _MAPS and isinstance(value, Mapping):
        return {name: close_objects(part) for name, part in value.items()}
    return close_objects(value)


def _json_source(schema: Mapping[str, Any]) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(_dump(schema), overrides=JSON_STYLE)  # type: ignore[arg-type]


def _dump(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"the JSON schema holds what JSON can't: {error}") from None
