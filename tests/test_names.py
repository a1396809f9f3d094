"""One name for one thing: classes, and the errors that the core tells of."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import pcache_core
import pcache_integrations
import pcache_templates
from pcache_core import PromptCacheError

TWICE = {"PromptCacheLLM"}  # each framework's users look for it under this name


@pytest.mark.parametrize("package", [pcache_core, pcache_templates, pcache_integrations])
def test_no_class_name_is_defined_twice_within_a_package(package: object) -> None:
    places: dict[str, list[str]] = defaultdict(list)
    root = Path(str(package.__file__)).parent  # type: ignore[attr-defined]
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{file.relative_to(root)}:{node.lineno}")
    assert places
    assert {n: at for n, at in places.items() if len(at) > 1 and n not in TWICE} == {}


def test_the_core_exports_every_error_of_its_tree() -> None:
    def tree(error: type[PromptCacheError]) -> Iterator[str]:
        yield error.__name__
        for child in error.__subclasses__():
            yield from tree(child)

    missing = {name for name in tree(PromptCacheError) if hasattr(pcache_core.errors, name)}
    assert missing - set(pcache_core.__all__) == set()
