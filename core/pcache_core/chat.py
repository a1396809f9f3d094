"""Chat messages to segments, through the model's own chat template."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pcache_core.errors import PromptError
from pcache_core.prompt import Prompt, Segment

ApplyTemplate = Callable[[list[dict[str, str]]], str]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message; its content is given in segments."""

    role: str
    segments: Sequence[Segment]

    @property
    def text(self) -> str:
        """The content as plain text."""
        return "".join(segment.text for segment in self.segments)


def render_chat(messages: Sequence[Message], apply_template: ApplyTemplate) -> Prompt:
    """Render messages so that markup becomes `literal` and their segments stay as they are.

    The template is rendered twice: with the real contents, which is the truth, and with a unique
    mark in place of each content, which shows where contents go. When filling the marks does not
    give the truth (a template that rewrites its contents), the prompt is the truth as one `text`.

    Raises: PromptError: no messages.
    """
    if not messages:
        raise PromptError("the chat has no messages; give at least one")
    truth = apply_template([{"role": m.role, "content": m.text} for m in messages])
    marks = [f"\ue0f0{secrets.token_hex(8)}\ue0f1" for _ in messages]
    marked = apply_template(
        [{"role": m.role, "content": mark} for m, mark in zip(messages, marks, strict=True)]
    )
    for contents in (
        [list(m.segments) for m in messages],
        [strip_segments(m.segments) for m in messages],
    ):
        segments = _fill(marked, marks, contents)
        if segments is not None and "".join(s.text for s in segments) == truth:
            return Prompt(segments)
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
    marked: str, marks: Sequence[str], contents: Sequence[Sequence[Segment]]
) -> list[Segment] | None:
    """Put the contents where their marks stand; None if a mark is not there exactly once."""
    segments: list[Segment] = []
    for mark, content in zip(marks, contents, strict=True):
        before, found, marked = marked.partition(mark)
        if not found or mark in marked:
            return None
        segments.append(Segment(before, "literal"))
        segments.extend(content)
    segments.append(Segment(marked, "literal"))
    return [segment for segment in segments if segment.text]
