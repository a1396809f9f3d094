"""Text to token ids and back, segment by segment."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pcache_core.errors import ChatTemplateError
from pcache_core.prompt import Segment
from pcache_core.threads import fork_safe

_MEMORY_TOKENS = 500_000
# Stands before a template and takes the place of the function that gives it today's date.
_DATE = {"Y": "2024", "y": "24", "m": "01", "d": "01", "e": "1", "-d": "1", "-m": "1", "j": "001"}
_DATE |= {"B": "January", "b": "Jan", "h": "Jan", "A": "Monday", "a": "Mon", "H": "00", "M": "00"}
_DATE |= {"S": "00", "I": "12", "p": "AM", "F": "2024-01-01", "D": "01/01/24", "T": "00:00:00"}
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('%{sign}','{value}')" for sign, value in _DATE.items())
    + " }}{% endmacro %}\n"
)


class SegmentTokenizer:
    """Tokenises each segment alone, without special tokens added; remembers recent ones.

    A lock guards the underlying tokenizer, whose settings change during a call.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._lock = fork_safe(threading.Lock())
        self._memory: OrderedDict[tuple[str, bool], tuple[int, ...]] = OrderedDict()
        self._remembered = 0
        self._markup: dict[str, tuple[str, tuple[str, ...]]] = {}  # of one chat template
        self.bos_ids: tuple[int, ...] = self._find_bos()

    def ids(self, segment: Segment) -> tuple[int, ...]:
        """The segment's token ids; special tokens written out in data stay plain text."""
        name = (segment.text, segment.is_markup)
        with self._lock:
            ids = self._memory.get(name)
            if ids is None:
                ids = tuple(
                    self._tokenizer(
                        segment.text,
                        add_special_tokens=False,
                        split_special_tokens=not segment.is_markup,
                        verbose=False,
                    )["input_ids"]
                )
                self._memory[name] = ids
                self._remembered += len(ids)
            self._memory.move_to_end(name)
            while self._remembered > _MEMORY_TOKENS:
                self._remembered -= len(self._memory.popitem(last=False)[1])
        return ids

    def holds_special(self, text: str) -> bool:
        """Whether a text spells a special token."""
        return any(token in text for token in self._tokenizer.all_special_tokens)

    def marks_roles(self) -> bool:
        """Whether the chat template writes a user's turn and an assistant's differently.

        One that doesn't is no dialogue format: it only joins the contents, and a completion prompt
        says the same.
        """
        if not self._tokenizer.chat_template:
            return False
        try:
            user, assistant = (
                self.apply_chat_template([{"role": role, "content": "Hello"}])
                for role in ("user", "assistant")
            )
        except ChatTemplateError:  # It knows roles, or it could not refuse one.
            return True
        return user != assistant

    def holds_chat_markup(self, text: str) -> bool:
        """Whether a text holds what the chat template writes around a message; no without one.

        That is a control token of the template's, or the template's beginning at its own.
        """
        opening, tokens = self._chat_markup()
        at_beginning = bool(opening) and text.lstrip().startswith(opening)
        return at_beginning or any(token in text for token in tokens)

    def _chat_markup(self) -> tuple[str, tuple[str, ...]]:
        """What the template writes before a message, and which control tokens it writes."""
        template = str(self._tokenizer.chat_template)
        if template not in self._markup:
            self._markup = {template: self._read_chat_markup()}
        return self._markup[template]

    def _read_chat_markup(self) -> tuple[str, tuple[str, ...]]:
        mark = "\ue0f0message\ue0f1"
        try:
            text = self.apply_chat_template([{"role": "user", "content": mark}])
        except ChatTemplateError:
            return "", ()
        added = [token.content for token in self._tokenizer.added_tokens_decoder.values()]
        tokens = (*added, *self._tokenizer.all_special_tokens)
        found = dict.fromkeys(token for token in tokens if token.strip() and token in text)
        return text.partition(mark)[0].strip(), tuple(found)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        with self._lock:
            text = self._tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return str(text)

    @property
    def folder(self) -> str:
        """Where the tokenizer was loaded from: a folder or a hub id; empty if made in memory."""
        return str(self._tokenizer.name_or_path or "")

    @property
    def chat_template(self) -> str:
        """The source of the model's template for messages without tools; empty if it has none."""
        return str(self._tokenizer.get_chat_template()) if self._tokenizer.chat_template else ""

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        *,
        undated: bool = False,
    ) -> str:
        """Render messages with the model's own template, ready for the assistant's answer.

        tools: as transformers takes them. A beginning-of-sequence token that the tokenizer adds
        by itself is left out. undated: today's date is always the same one, 1 January 2024.
        Raises: ChatTemplateError: there is no template, or it refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise ChatTemplateError(
                "the tokenizer has no chat template; use a completion-style LLM class, or set "
                "tokenizer.chat_template"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                chat_template=_FIXED_DATE + self.chat_template if undated else None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:
            roles = [message["role"] for message in messages]
            raise ChatTemplateError(
                f"the model's chat template refuses these messages (roles {roles}): {error}"
            ) from error
        bos = self._tokenizer.bos_token
        return str(text).removeprefix(bos) if self.bos_ids and bos else str(text)

    def _find_bos(self) -> tuple[int, ...]:
        """The one token the tokenizer puts before every text, if it does."""
        bos = self._tokenizer.bos_token_id
        if bos is None:
            return ()
        plain = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self._tokenizer("a")["input_ids"]
        added = full[: len(full) - len(plain)] if full[-len(plain) :] == plain else full[:1]
        return (bos,) if bos in added and full[:1] == [bos] else ()
