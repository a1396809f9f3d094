"""Answers in a schema: `with_structured_output` and `response_format`."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Literal, cast, get_args

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
from pydantic import BaseModel

from pcache_core.errors import OptionError
from pcache_integrations.calls import format_of

Method = Literal["json_schema", "function_calling", "json_mode"]


def structured(
    model: BaseChatModel,
    schema: Mapping[str, Any] | type | None,
    method: str,
    *,
    include_raw: bool,
    strict: bool | None,
) -> Runnable[LanguageModelInput, Any]:
    """Return a model whose answers are of a schema, and a parser after it.

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
        typed = cast(type[BaseModel], schema)
        parser = PydanticOutputParser(pydantic_object=typed) if is_class else JsonOutputParser()
    if not include_raw:
        return bound | parser
    parsed = RunnablePassthrough.assign(
        parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
    )
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")


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
    wanted = convert_to_json_schema(schema)  # type: ignore[arg-type]
    return model.bind(
        response_format=format_of("answer", wanted, strict=strict is not False),
        ls_structured_output_format=_traced(schema, method),
    )


def _traced(schema: Mapping[str, Any] | type, method: str) -> dict[str, Any]:
    """Return what tracers are told."""
    return {"kwargs": {"method": method}, "schema": convert_to_json_schema(schema)}  # type: ignore[arg-type]


def as_format(response_format: object) -> object:
    """Return a class that says an answer's form as OpenAI's mapping; anything else as it is.

    Raises: OptionError: the class says no form.
    """
    if not isinstance(response_format, type):
        return response_format
    try:
        return format_of("answer", convert_to_json_schema(response_format))
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"response_format={response_format!r} can't be described: {error}"
        ) from error
