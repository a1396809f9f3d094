"""Tools that a model may call, and the calls that it makes."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pcache_core.errors import OptionError

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may ask for.

    parameters: a JSON schema of the arguments, an object.

    Raises: OptionError: a name that can't be written in a call, parameters that are no schema.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"type": "object", "properties": {}}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise OptionError(
                f"a tool's name must be letters, digits and _.:- (at most 128), got {self.name!r}"
            )
        if not isinstance(self.parameters, Mapping):
            raise OptionError(
                f"tool {self.name!r}: parameters must be a JSON schema, "
                f"got {type(self.parameters).__name__}"
            )

    def as_function(self) -> dict[str, Any]:
        """Return the tool as chat templates take it."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": dict(self.parameters),
            },
        }


def new_call_id() -> str:
    """Return an id that every chat template takes: nine letters and digits."""
    return secrets.token_hex(5)[:9]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model makes. id: which its result is to name."""

    name: str
    arguments: Mapping[str, Any]
    id: str = field(default_factory=new_call_id)

    @property
    def arguments_text(self) -> str:
        """The arguments as chat templates write them."""
        return json.dumps(dict(self.arguments), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class InvalidToolCall:
    """What was meant as a call and is none. text: as written, markup included."""

    text: str
    reason: str
    name: str | None = None
    id: str = field(default_factory=new_call_id)


class ToolAnswer(NamedTuple):
    """An answer, or a piece of one, taken apart."""

    content: str
    calls: tuple[ToolCall, ...] = ()
    invalid: tuple[InvalidToolCall, ...] = ()
