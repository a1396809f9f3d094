"""The engine behind an LLM, and what LlamaIndex needs to know of its model."""

from __future__ import annotations

from functools import cached_property

from pcache_core import ChatTemplateError
from pcache_core.lm import TextModel
from pcache_integrations._engines import EngineHandle


class LazyEngine(EngineHandle):
    """An engine that is built when it is first needed."""

    @cached_property
    def marks_roles(self) -> bool:
        """Whether the model's chat template writes a user's turn and an assistant's differently."""
        return self.get().lm.text.marks_roles()

    @cached_property
    def calls_functions(self) -> bool:
        """Whether the model's chat template tells it of tools and writes down its calls."""
        return has_chat_template(self.get().lm) and self.get().tool_format.is_native

    @cached_property
    def takes_system(self) -> bool:
        """Whether the model's chat template takes a system message, or there is none to refuse."""
        return _takes_system(self.get().lm)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts that the model's tokenizer reads as special tokens."""
        tokens = self.get().lm.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in tokens if token.special)


def has_chat_template(lm: TextModel) -> bool:
    """Whether the model brings a chat template."""
    return bool(lm.tokenizer.chat_template)


def _takes_system(lm: TextModel) -> bool:
    if not has_chat_template(lm):
        return True
    chat = [{"role": role, "content": "Hello"} for role in ("system", "user")]
    try:
        return bool(lm.text.apply_chat_template(chat))
    except ChatTemplateError:
        return False


class Tokenizer:
    """Text to token ids with an engine's tokenizer; a pickle of it builds the engine anew."""

    def __init__(self, lazy: LazyEngine) -> None:
        self._lazy = lazy

    def __call__(self, text: str) -> list[int]:
        return list(self._lazy.get().lm.token_ids(text))
