"""The three use cases of the Prompt Cache paper as schemas (arXiv 2311.04934, section 5.6).

`render` fills one of the templates beside this file and returns PML.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

NAMES = ("code_generation", "personalisation", "travel_plan")

_environment = ImmutableSandboxedEnvironment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(name: str, **values: Any) -> str:
    """Return the schema of a use case as PML.

    code_generation: a code base, each file a module. `files`: paths below the folder that
        `add_schema(..., src_root=folder)` names; a module is called as its file is, with `.` for
        every `/`.
    personalisation: one trait out of each of six unions. Takes no values.
    travel_plan: a plan with parameters for everything that differs. Takes no values.

    Raises: ValueError: unknown name. jinja2.UndefinedError: a value is missing.
    """
    if name not in NAMES:
        raise ValueError(f"unknown use case {name!r}; use one of {', '.join(NAMES)}")
    return _environment.get_template(f"{name}.pml.j2").render(values)
