"""Text to token ids and back, segment by segment: what every model has, also one on a server."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from pcache_core.errors import ChatTemplateError
from pcache_core.lm.loading import load_tokenizer, resolve
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
_HTML_TAG = re.compile(
    "</?(a|abbr|acronym|address|area|article|aside|audio|b|base|bdi|bdo|big|blockquote|body|br|"
    "button|canvas|caption|center|cite|code|col|colgroup|data|datalist|dd|del|details|dfn|dialog|"
    "dir|div|dl|dt|em|embed|fieldset|figcaption|figure|font|footer|form|frame|frameset|h[1-6]|head|"
    "header|hgroup|hr|html|i|iframe|img|input|ins|kbd|label|legend|li|link|main|map|mark|menu|meta|"
    "meter|nav|noframes|noscript|object|ol|optgroup|option|output|p|param|picture|pre|progress|q|"
    "rp|rt|ruby|s|samp|script|section|select|small|source|span|strike|strong|style|sub|summary|sup|"
    "svg|table|tbody|td|textarea|tfoot|th|thead|time|title|tr|track|tt|u|ul|var|video|wbr)\\s*/?>",
    re.IGNORECASE,
)
_ROLES = (("user",), ("system", "user", "assistant", "user"), ("user", "assistant", "user"))


class _ChatMarkup(NamedTuple):
    """What a chat template writes before a message, and the control tokens that it writes.

    marks_roles: whether a user's turn looks otherwise than an assistant's.
    """

    opening: str = ""
    tokens: tuple[str, ...] = ()
    marks_roles: bool = False


class SegmentTokenizer:
    """Tokenises each segment alone, without special tokens added; remembers recent ones.

    A lock guards the underlying tokenizer, whose settings change during a call.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._lock = fork_safe(threading.Lock())
        self._memory: OrderedDict[tuple[str, bool], tuple[int, ...]] = OrderedDict()
        self._remembered = 0
        self._markup: dict[str, _ChatMarkup] = {}  # of one chat template
        self._controls: Mapping[str, int] = {}
        self._specials: frozenset[str] = frozenset()
        self._controls_of: object = None  # what they depend on
        self._plain: Tokenizer | None = None
        self.bos_ids: tuple[int, ...] = self._find_bos()

    def ids(self, segment: Segment) -> tuple[int, ...]:
        """Tokenise a segment; control tokens written out in data stay plain text."""
        name = (segment.text, segment.is_markup)
        with self._lock:
            controls = self._known_controls()
            ids = self._memory.get(name)
            if ids is None:
                ids = tuple(self._encode(segment.text, split=not segment.is_markup))
                if not segment.is_markup:
                    ids = self._without(controls, segment.text, ids)
                self._memory[name] = ids
                self._remembered += len(ids)
            self._memory.move_to_end(name)
            while self._remembered > _MEMORY_TOKENS:
                self._remembered -= len(self._memory.popitem(last=False)[1])
        return ids

    def control_tokens(self, text: str) -> list[str]:
        """Return the control tokens that a text spells, longer ones first.

        A control token is special, with a role or without, or an added token that the chat template
        writes or compares with; other added tokens, such as line breaks and tags of HTML, are not.
        """
        with self._lock:
            found = [token for token in self._known_controls() if token in text]
        return sorted(found, key=len, reverse=True)

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token that a text is; None for any other text."""
        with self._lock:
            controls = self._known_controls()
            return controls[text] if text in self._specials else None

    def is_special(self, text: str) -> bool:
        """Say whether a text is a special token, which no answer spells."""
        return self.special_id(text) is not None

    def holds_special(self, text: str) -> bool:
        """Say whether a text spells a control token."""
        return bool(self.control_tokens(text))

    def _encode(self, text: str, *, split: bool) -> Sequence[int]:
        return self._tokenizer(  # type: ignore[no-any-return]
            text, add_special_tokens=False, split_special_tokens=split, verbose=False
        )["input_ids"]

    def _without(
        self, controls: Mapping[str, int], text: str, ids: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Return a text's ids without control tokens; `ids` where there is no other way to read it.

        transformers splits special tokens alone, and no token that the model itself can compose.
        """
        forbidden = set(controls.values()) - {self._tokenizer.unk_token_id}
        if forbidden.isdisjoint(ids):
            return ids
        other = self._encode_plain(controls, text)
        if not forbidden.isdisjoint(other):
            spelled = sorted((token for token in controls if token in text), key=len, reverse=True)
            pieces = re.split(f"({'|'.join(map(re.escape, spelled))})", text) if spelled else [text]
            # A character of a control token can't be one.
            parts = (
                part
                for number, piece in enumerate(pieces)
                for part in (piece if number % 2 else [piece])
                if part
            )
            other = [i for part in parts for i in self._encode(part, split=True)]
        return tuple(other) if forbidden.isdisjoint(other) else ids

    def _encode_plain(self, controls: Mapping[str, int], text: str) -> Sequence[int]:
        """Tokenise with a copy of the tokenizer to which every control token is special."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            return self._encode(text, split=True)
        if self._plain is None:
            self._plain = Tokenizer.from_str(backend.to_str())
            self._plain.no_truncation()
            self._plain.no_padding()
            self._plain.add_special_tokens(list(controls))
            self._plain.encode_special_tokens = True
        return self._plain.encode(text, add_special_tokens=False).ids

    def _known_controls(self) -> Mapping[str, int]:
        """Return the ids of the control tokens; what was remembered goes when they change."""
        tokenizer = self._tokenizer
        named = tokenizer.all_special_tokens
        state = (len(tokenizer), str(tokenizer.chat_template), tuple(named))
        if self._controls_of != state:
            markup = "\n".join(self._template_texts())
            found = dict(zip(named, tokenizer.all_special_ids, strict=True))
            added = tokenizer.added_tokens_decoder  # slow: Gemma has thousands
            found |= {token.content: number for number, token in added.items() if token.special}
            self._specials = frozenset(found)
            for number, token in added.items():
                text = token.content
                if text.strip() and text in markup and not _HTML_TAG.fullmatch(text):
                    found[text] = number
            self._controls, self._controls_of = found, state
            self._plain = None
            self._memory.clear()
            self._remembered = 0
        return self._controls

    def _template_texts(self) -> Iterator[str]:
        """Yield the sources of the chat templates, and what the model's own writes."""
        sources = self._tokenizer.chat_template
        if not sources:
            return
        yield from sources.values() if isinstance(sources, dict) else [str(sources)]
        for roles in _ROLES:
            with suppress(ChatTemplateError):
                yield self.apply_chat_template([{"role": r, "content": "Hello"} for r in roles])

    def marks_roles(self) -> bool:
        """Return whether the chat template writes a user's turn and an assistant's differently.

        One that doesn't is no dialogue format: it only joins the contents, and a completion prompt
        says the same.
        """
        return self._chat_markup().marks_roles

    def holds_chat_markup(self, text: str) -> bool:
        """Whether a text holds what the chat template writes around a message; no without one.

        That is a control token of the template's, or the template's beginning at its own.
        """
        markup = self._chat_markup()
        at_beginning = bool(markup.opening) and text.lstrip().startswith(markup.opening)
        return at_beginning or any(token in text for token in markup.tokens)

    def _chat_markup(self) -> _ChatMarkup:
        """Return what the template writes, which is found out once."""
        template = str(self._tokenizer.chat_template or "")
        if template not in self._markup:
            self._markup = {template: self._read_chat_markup() if template else _ChatMarkup()}
        return self._markup[template]

    def _read_chat_markup(self) -> _ChatMarkup:
        mark = "\ue0f0message\ue0f1"
        try:
            user = self.apply_chat_template([{"role": "user", "content": mark}])
        except ChatTemplateError:  # It knows roles, or it could not refuse one.
            return _ChatMarkup(marks_roles=True)
        opening, tokens = user.partition(mark)[0].strip(), tuple(self.control_tokens(user))
        with suppress(ChatTemplateError):
            assistant = self.apply_chat_template([{"role": "assistant", "content": mark}])
            return _ChatMarkup(opening, tokens, marks_roles=user != assistant)
        return _ChatMarkup(opening, tokens, marks_roles=True)

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
        """Return the one token the tokenizer puts before every text, if it does."""
        bos = self._tokenizer.bos_token_id
        if bos is None:
            return ()
        plain = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self._tokenizer("a")["input_ids"]
        added = full[: len(full) - len(plain)] if full[-len(plain) :] == plain else full[:1]
        return (bos,) if bos in added and full[:1] == [bos] else ()


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
