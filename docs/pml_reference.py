"""Writes pml.md: what the language means, from beside its parser, and what its grammars allow.

Run it after a change of either: `.venv/bin/python docs/pml_reference.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pcache_core.pml
from pcache_core.pml.grammar import ANY, AttributeRule, ElementRule, GrammarName, grammar

PAGE = Path(__file__).with_name("pml.md")
_PACKAGE = Path(pcache_core.pml.__file__).parent
_NOTE = "<!-- Written by pml_reference.py from the language's README and grammars. -->"
_ANY_ELEMENT = "NAME"
_TITLES: dict[GrammarName, str] = {
    "schema": "Elements of schemas",
    "prompt": "Elements of prompts",
}


def page() -> str:
    """The whole page."""
    readme = (_PACKAGE / "README.md").read_text("utf-8")
    prose = re.sub(r"\[([^]]+\.rng)\]\([^)]+\)", r"`\1`", readme)
    return "\n".join([_NOTE, "", prose.rstrip(), "", *_elements()])


def _elements() -> Iterator[str]:
    for name, title in _TITLES.items():
        yield f"## {title}"
        yield ""
        yield f"As `{name}.rng` has them."
        yield ""
        rules = grammar(name).rules
        for tag in rules:
            yield from _element(tag, rules)


def _element(tag: str, rules: dict[str, ElementRule]) -> Iterator[str]:
    rule = rules[tag]
    yield f"### {_shown(tag)}"
    yield ""
    if tag == ANY:
        yield "Uses the module, or fills the slot, of that name."
        yield ""
    parents = [_shown(other) for other in rules if tag in rules[other].children]
    yield f"Stands in: {', '.join(parents) or 'nothing, it is the outermost element'}."
    yield ""
    held = ["text"] if rule.holds_text else []
    held += [_shown(child) for child in dict.fromkeys(rule.children)]
    yield f"Holds: {', '.join(held) or 'nothing'}."
    yield ""
    yield from _attributes(rule)


def _attributes(rule: ElementRule) -> Iterator[str]:
    if not rule.attributes:
        return
    yield "| attribute | must be there | value |"
    yield "|---|---|---|"
    for name, attribute in rule.attributes.items():
        groups = [group for group in rule.required if name in group]
        others = [f"`{other}`" for group in groups for other in group if other != name]
        needed = f"yes, or {' or '.join(others)}" if others else "yes" if groups else "no"
        shown = "any other" if name == ANY else f"`{name}`"
        yield f"| {shown} | {needed} | {_value(name, attribute)} |"
    yield ""


def _value(name: str, attribute: AttributeRule) -> str:
    if attribute.values:
        return " or ".join(f"`{value}`" for value in attribute.values)
    if name == ANY:
        return "the argument of the parameter of that name"
    return attribute.kind or "any text"


def _shown(tag: str) -> str:
    return f"`<{_ANY_ELEMENT if tag == ANY else tag}>`"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
