"""Chat messages to segments, through the model's own chat template."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pcache_core.errors import ChatTemplateError, PromptError
from pcache_core.prompt import Prompt, Segment

ApplyTemplate = Callable[[list[dict[str, str]]], str]


def _nothing(text: str) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message; its content is given in segments."""

    role: str
    segments: Sequence[Segment]

    def __post_init__(self) -> None:
        if isinstance(self.segments, str):
            raise PromptError(
                "a message holds segments, got str; "
                f"use [Segment({self.segments[:20]!r}, 'argument')]"
            )

    @property
    def text(self) -> str:
        """The content as plain text."""
        return "".join(segment.text for segment in self.segments)


def render_chat(
    messages: Sequence[Message],
    apply_template: ApplyTemplate,
    holds_special: Callable[[str], bool] = _nothing,
) -> Prompt:
    """Render messages so that markup becomes `literal` and their segments stay as they are.

    The template is rendered twice: with the real contents, which is the truth, and with a unique
    mark in place of each content, which shows where contents go. When filling the marks does not
    give the truth (a template that rewrites its contents), the prompt is the truth as one `text`.

    holds_special: whether a text spells a special token, which must not become one.
    Raises: PromptError: no messages. ChatTemplateError: a template rewrites contents that spell
        special tokens.
    """
    if not messages:
        raise PromptError("the chat has no messages; give at least one")
    truth = apply_template([{"role": m.role, "content": m.text} for m in messages])
    marks = [f"\ue0f0{secrets.token_hex(8)}\ue0f1" for _ in messages]
    marked = apply_template(
        [{"role": m.role, "content": mark} for m, mark in zip(messages, marks, strict=True)]
    )
    segments = _fill(marked, marks, [message.segments for message in messages], truth)
    if segments is not None:
        return Prompt(segments)
    if any(holds_special(message.text) for message in messages):
        raise ChatTemplateError(
            "the chat template rewrites its messages, and one of them spells a special token, "
            "which can't be told from the template's own; remove it from the message"
        )
    return Prompt.from_text(truth)


def strip_segments(segments: Sequence[Segment]) -> list[Segment]:
    """The segments of `text.strip()`: many templates trim their contents."""
    kept = list(segments)
    while kept and not kept[0].text.lstrip():
        kept.pop(0)
    while kept and not kept[-1].text.rstrip():
        kept.pop()
    if kept:
        kept[0] = Segment(kept[0].text.lstrip(), kept[0].kind, kept[0].name)
        kept[-1] = Segment(kept[-1].text.rstrip(), kept[-1].kind, kept[-1].name)
    return kept


def _fill(
    marked: str, marks: Sequence[str], contents: Sequence[Sequence[Segment]], truth: str
) -> list[Segment] | None:
    """Put contents where their marks stand, as they are or stripped, whichever gives the truth.

    None if a mark does not stand there once and in order, or neither gives the truth.
    """
    literals = []
    for mark in marks:
        before, _, marked = marked.partition(mark)
        literals.append(before)
    literals.append(marked)
    if not truth.startswith(literals[0]):
        return None
    segments = [Segment(literals[0], "literal")]
    position = len(literals[0])
    for content, after in zip(contents, literals[1:], strict=True):
        for variant in (content, strip_segments(content)):
            text = "".join(segment.text for segment in variant) + after
            if truth.startswith(text, position):
                segments += [*variant, Segment(after, "literal")]
                position += len(text)
                break
        else:
            return None
    return segments if position == len(truth) else None
