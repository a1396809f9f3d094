"""Answers in a schema: `with_structured_output` and `response_format`."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Literal, get_args

from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.output_parsers import (
    BaseOutputParser,
    JsonOutputKeyToolsParser,
    JsonOutputParser,
    PydanticOutputParser,
    PydanticToolsParser,
)
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from pcache_core.errors import OptionError
from pcache_core.grammar import close_objects

Method = Literal["json_schema", "function_calling", "json_mode"]
_ANY_OBJECT: dict[str, Any] = {"type": "object"}


def structured(
    model: BaseChatModel,
    schema: Mapping[str, Any] | type | None,
    method: str,
    *,
    include_raw: bool,
    strict: bool | None,
) -> Runnable[LanguageModelInput, Any]:
    """A model whose answers are of a schema, behind it a parser.

    Raises: OptionError: no schema where one is needed, an unknown method.
    """
    if method not in get_args(Method):
        raise OptionError(f"method={method!r} is unknown; use one of {', '.join(get_args(Method))}")
    if schema is None and method != "json_mode":
        raise OptionError(f"method={method!r} needs a schema; without one use method='json_mode'")
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    if method == "function_calling":
        assert schema is not None
        bound, parser = _by_function(model, schema, is_class=is_class)
    else:
        bound = _by_format(model, schema, method, strict=strict)
        parser = _parser(schema) if is_class else JsonOutputParser()
    if not include_raw:
        return bound | parser
    parsed = RunnablePassthrough.assign(
        parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
    )
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _parser(schema: Any) -> BaseOutputParser[Any]:
    return PydanticOutputParser(pydantic_object=schema)


def _by_function(
    model: BaseChatModel, schema: Mapping[str, Any] | type, *, is_class: bool
) -> tuple[Runnable[LanguageModelInput, Any], BaseOutputParser[Any]]:
    name = convert_to_openai_tool(schema)["function"]["name"]
    bound = model.bind_tools(
        [schema],  # type: ignore[list-item]
        tool_choice=name,
        ls_structured_output_format=_traced(schema, "function_calling"),
    )
    if is_class:
        assert isinstance(schema, type)
        return bound, PydanticToolsParser(tools=[schema], first_tool_only=True)
    return bound, JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)


def _by_format(
    model: BaseChatModel,
    schema: Mapping[str, Any] | type | None,
    method: str,
    *,
    strict: bool | None,
) -> Runnable[LanguageModelInput, Any]:
    if schema is None:
        return model.bind(response_format={"type": "json_object"})
    wanted = {
        "name": "answer",
        "schema": convert_to_json_schema(schema),  # type: ignore[arg-type]
        "strict": strict is not False,
    }
    return model.bind(
        response_format={"type": "json_schema", "json_schema": wanted},
        ls_structured_output_format=_traced(schema, method),
    )


def _traced(schema: Mapping[str, Any] | type, method: str) -> dict[str, Any]:
    """What tracers are told."""
    return {"kwargs": {"method": method}, "schema": convert_to_json_schema(schema)}  # type: ignore[arg-type]


def format_schema(response_format: object) -> Mapping[str, Any] | None:
    """The JSON schema of an answer; None for free text.

    response_format: as OpenAI takes it, or a class or schema that says it itself.
    Raises: OptionError: none of these.
    """
    if response_format is None:
        return None
    if isinstance(response_format, type):
        return _closed(convert_to_json_schema(response_format))
    if not isinstance(response_format, Mapping):
        raise OptionError(f"response_format must be a mapping or a class, got {response_format!r}")
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _ANY_OBJECT
    if kind == "json_schema":
        wanted = response_format.get("json_schema")
        schema = wanted.get("schema") if isinstance(wanted, Mapping) else None
        if not isinstance(schema, Mapping):
            raise OptionError(
                "response_format of type json_schema needs a schema: "
                "{'type': 'json_schema', 'json_schema': {'name': ..., 'schema': {...}}}"
            )
        assert isinstance(wanted, Mapping)
        return schema if wanted.get("strict") is False else _closed(schema)
    raise OptionError(
        f"response_format of type {kind!r} is unknown; use text, json_object or json_schema"
    )


def _closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    closed: Mapping[str, Any] = close_objects(schema)
    return closed
