"""Text to token ids and back: what every model has, also one that runs on a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pcache_core.lm.loading import load_tokenizer, resolve
from pcache_core.lm.tokenizer import SegmentTokenizer
from pcache_core.prompt import Segment


class TextModel:
    """A model, as far as its tokenizer knows it.

    context_length: most tokens that it holds, None without a limit.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, context_length: int | None
    ) -> None:
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.text: SegmentTokenizer = SegmentTokenizer(tokenizer)
        self.name: str = name
        self.context_length: int | None = context_length

    @staticmethod
    def without_weights(name: str, context_length: int | None) -> TextModel:
        """Load the tokenizer of a built-in model, a directory, a hub id or a GGUF file; no weights.

        Raises: ModelError: there is none.
        """
        path = Path(name).expanduser()
        # A directory without weights will do here.
        source = str(path) if path.is_dir() and (path / "config.json").is_file() else resolve(name)
        return TextModel(load_tokenizer(name, source), name, context_length)

    def token_ids(self, text: str) -> list[int]:
        """Return the ids of a text alone, without special tokens added."""
        return list(self.text.ids(Segment(text, "text")))

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text alone, without special tokens added."""
        return len(self.token_ids(text))

    def stop_ids(self, stop: Sequence[str]) -> frozenset[int]:
        """Return the ids of stop strings that are special tokens: no answer spells their text."""
        found = map(self.text.special_id, stop)
        return frozenset(number for number in found if number is not None)
