"""Prompt Markup Language: schemas and prompts as XML, their trees, and their positions.

`parse_schema` and `parse_prompt` read text into the trees of `nodes.py`; `place` gives a schema its
positions, `resolve` a prompt its runs. README.md beside this file is the language reference.
"""

from pcache_core.errors import PMLError
from pcache_core.pml.check import check_schema
from pcache_core.pml.layout import (
    Mark,
    Marks,
    ModulePath,
    PlacedItem,
    PlacedModule,
    PlacedParam,
    PlacedRole,
    PlacedSlot,
    PlacedText,
    SchemaLayout,
    Tokenise,
    no_marks,
    place,
)
from pcache_core.pml.markup import Limits
from pcache_core.pml.nodes import (
    Document,
    Module,
    ModuleUse,
    Param,
    PromptTree,
    Role,
    RoleName,
    Scaffold,
    Schema,
    Slot,
    Text,
    Turn,
    Union,
)
from pcache_core.pml.order import Positions, RunKind
from pcache_core.pml.parser import parse_prompt, parse_schema
from pcache_core.pml.resolve import Resolution, TokenRun, resolve

__all__ = [
    "Document",
    "Limits",
    "Mark",
    "Marks",
    "Module",
    "ModulePath",
    "ModuleUse",
    "PMLError",
    "Param",
    "PlacedItem",
    "PlacedModule",
    "PlacedParam",
    "PlacedRole",
    "PlacedSlot",
    "PlacedText",
    "Positions",
    "PromptTree",
    "Resolution",
    "Role",
    "RoleName",
    "RunKind",
    "Scaffold",
    "Schema",
    "SchemaLayout",
    "Slot",
    "Text",
    "TokenRun",
    "Tokenise",
    "Turn",
    "Union",
    "check_schema",
    "no_marks",
    "parse_prompt",
    "parse_schema",
    "place",
    "resolve",
]
