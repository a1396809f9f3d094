"""A model that runs on a server: here are its tokenizer and what the server says of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pcache_core.lm.loading import load_tokenizer, resolve
from pcache_core.lm.tokenizer import SegmentTokenizer
from pcache_core.prompt import Segment


class ServedModel:
    """Text to token ids and back, as the model that the server runs has it.

    context_length: most tokens of a prompt and its answer together.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, context_length: int | None
    ) -> None:
        self.tokenizer = tokenizer
        self.text = SegmentTokenizer(tokenizer)
        self.name = name
        self.context_length = context_length

    @classmethod
    def from_pretrained(cls, name: str, context_length: int | None) -> ServedModel:
        """Load the tokenizer of a built-in model, a directory, a hub id or a GGUF file; no weights.

        Raises: ModelError: there is none.
        """
        path = Path(name).expanduser()
        # A directory without weights will do here.
        source = str(path) if path.is_dir() and (path / "config.json").is_file() else resolve(name)
        return cls(load_tokenizer(name, source), name, context_length)

    def token_ids(self, text: str) -> list[int]:
        """Ids of a text alone, without special tokens added."""
        return list(self.text.ids(Segment(text, "text")))

    def count_tokens(self, text: str) -> int:
        """Tokens of a text alone, without special tokens added."""
        return len(self.token_ids(text))

    def stop_ids(self, stop: Sequence[str]) -> list[int]:
        """Ids of stop strings that are special tokens: their text never appears in an answer."""
        tokenizer = self.tokenizer
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        return [special[text] for text in stop if text in special]
