"""What a chat template puts between messages, found out by rendering it with marks for contents."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import cache

from pcache_core.chat.messages import ApplyTemplate
from pcache_core.errors import ChatTemplateError
from pcache_core.pml import Mark, Marks, RoleName

# Messages that may have to stand before or after others for a template to render them.
_BEFORE: tuple[tuple[RoleName, ...], ...] = (
    (),
    ("user",),
    ("system",),
    ("user", "assistant"),
    ("system", "user"),
    ("system", "user", "assistant"),
)
_AFTER: tuple[tuple[RoleName, ...], ...] = ((), ("user",), ("assistant", "user"))


def template_marks(
    apply_template: ApplyTemplate, tokenise: Callable[[str], Sequence[int]]
) -> Marks:
    """Return the marks of a model's own chat template.

    tokenise: ids of a template's text, special tokens included.
    """

    @cache
    def marks(before: RoleName | None, after: RoleName | None) -> Mark | None:
        text = _between(apply_template, before, after)
        return None if text is None else Mark(text, tuple(tokenise(text)))

    return marks


def marks_of(apply_template: ApplyTemplate, roles: Sequence[RoleName]) -> list[str] | None:
    """The text before each message, and before the answer; None if the template refuses them."""
    names = [f"\ue0f0{secrets.token_hex(8)}\ue0f1" for _ in roles]
    messages = [{"role": role, "content": name} for role, name in zip(roles, names, strict=True)]
    try:
        text = apply_template(messages)
    except ChatTemplateError:
        return None
    found = []
    for name in names:
        mark, name_there, text = text.partition(name)
        if not name_there:
            return None
        found.append(mark)
    return [*found, text]


def _between(
    apply_template: ApplyTemplate, before: RoleName | None, after: RoleName | None
) -> str | None:
    """Return the text between two messages, in the first conversation that the template renders.

    Before everything and after everything nothing else may stand.
    """
    own = [role for role in (before, after) if role is not None]
    openings = _BEFORE if before is not None else _BEFORE[:1]
    endings = _AFTER if after is not None else _AFTER[:1]
    for opening in openings:
        for ending in endings:
            found = marks_of(apply_template, [*opening, *own, *ending])
            if found is not None:
                return found[len(opening) + (before is not None)]
    return None
