"""What every engine offers, wherever its model runs, and its history in numbers."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pcache_core.chat.calls import Tool
from pcache_core.chat.messages import Message, render_chat
from pcache_core.chat.tools import ToolFormat, render_tool_chat, tool_format
from pcache_core.errors import OptionError, PromptError
from pcache_core.library.preamble import Preamble
from pcache_core.params import REPAIR, ReuseMode, SamplingParams, check_repair, check_reuse
from pcache_core.prompt import Prompt, TokenisedPrompt, tokenise
from pcache_core.report import Chunk, EncodeReport, ForgetReport, Generation, Report, StoreStats
from pcache_core.threads import fork_safe

if TYPE_CHECKING:
    from pcache_core.lm import TextModel

_KEPT_REPORTS = 256


@dataclass(frozen=True, slots=True)
class EngineStats(StoreStats):
    """What the store holds and did, and what the engine did since it was made.

    requests: that were finished. prompt_tokens: of all of them, the sum of
    cached_tokens: served from a prefix or a state, and so saved from being computed,
    computed_tokens: that ran through the model as part of a prompt, and those that were encoded for
        it.
    repaired_tokens: reused ones that were computed again all the same.
    generated_tokens: of answers. drafted_tokens, accepted_tokens: tried ahead, and found right.
    encoded_tokens, encode_ms: encoding of states, for requests and ahead of them.
    prefill_ms, repair_ms: forwards of the requests before their first token.
    running, waiting: requests that are at work, and those that wait for their turn, right now.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    repaired_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    encoded_tokens: int = 0
    encode_ms: float = 0.0
    prefill_ms: float = 0.0
    repair_ms: float = 0.0
    running: int = 0
    waiting: int = 0

    @staticmethod
    def of(store: StoreStats, reports: Reports, **counts: float) -> EngineStats:
        """Make it from what each part counted."""
        own: dict[str, Any] = {name: getattr(store, name) for name in StoreStats.__slots__}
        return EngineStats(**own | reports.totals() | counts)


_SUMMED = (
    "prompt_tokens", "cached_tokens", "computed_tokens", "repaired_tokens", "generated_tokens",
    "drafted_tokens", "accepted_tokens", "prefill_ms", "repair_ms",
)  # fmt: skip


class Reports(deque[Report]):
    """The last 256 reports, and sums over all there ever were. Thread-safe."""

    def __init__(self) -> None:
        super().__init__(maxlen=_KEPT_REPORTS)
        self._lock = fork_safe(threading.Lock())
        self._totals: dict[str, float] = dict.fromkeys(("requests", *_SUMMED), 0)

    def append(self, report: Report) -> None:
        """Add a finished request."""
        with self._lock:
            super().append(report)
            self._totals["requests"] += 1
            for name in _SUMMED:
                self._totals[name] += getattr(report, name)

    def __getitem__(self, index: Any) -> Any:
        """Return one report, or a list for a slice such as `[-3:]`."""
        with self._lock:
            return [*super().__iter__()][index]

    def __iter__(self) -> Iterator[Report]:
        """Yield the reports there are now, whatever ends meanwhile."""
        with self._lock:
            return iter([*super().__iter__()])

    def totals(self) -> dict[str, float]:
        """Return the sums by the names of `EngineStats`."""
        with self._lock:
            return dict(self._totals)


class Engine(ABC):
    """Answers prompts, with what it can of them reused.

    lm: the model, as far as every engine has it. reuse, repair: of requests that don't name their
    own. reports: of the last 256 requests.

    Raises: OptionError: an unknown mode, a repair budget out of range, something else than a
        preamble.
    """

    def __init__(
        self,
        lm: TextModel,
        reuse: ReuseMode,
        namespace: str,
        preamble: Preamble | None,
        repair: float | None = None,
    ) -> None:
        if preamble is not None and not isinstance(preamble, Preamble):
            raise OptionError(
                f"preamble must be a Preamble, got {type(preamble).__name__}; for example "
                "Preamble(company=[...]), Preamble.of_file(...) or Preamble.none()"
            )
        self.lm = lm
        self.reuse = check_reuse(reuse)
        self.repair: float | None = check_repair(repair)
        self.namespace = namespace
        self.reports: Reports = Reports()

    @property
    @abstractmethod
    def preamble(self) -> Preamble:
        """What modules are encoded after."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of the model's configuration and weights."""

    @property
    @abstractmethod
    def most_state_tokens(self) -> int | None:
        """Tokens of the largest state that can be kept; None where no limit is known."""

    @abstractmethod
    def preamble_for(self, text: str) -> tuple[int, ...]:
        """Return the ids that a module of this text is encoded after.

        The first module of a prompt is encoded after the first of them, which are the opening.
        """

    @abstractmethod
    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        reuse: ReuseMode | None = None,
        repair: float | None = None,
    ) -> Generator[Chunk, None, None]:
        """Answer piece by piece. The last chunk has `finish_reason` and `report`.

        reuse, repair: for this request, instead of the engine's; `repair` alone means `balanced`.
        Raises: ContextLengthError, OptionError, PromptError: before any work.
            DeadlineExceededError: `params.timeout_s` has passed.
        """

    @abstractmethod
    def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        reuse: ReuseMode | None = None,
        repair: float | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Answer as `stream` does, without blocking the event loop."""

    @abstractmethod
    def encode(
        self,
        texts: Sequence[str],
        progress: bool = True,  # noqa: FBT001, FBT002 (the published signature)
    ) -> EncodeReport:
        """Precompute the states of documents."""

    @abstractmethod
    def rank(self, question: str, documents: Sequence[str]) -> list[float]:
        """Score documents by the attention that the question pays to them."""

    @abstractmethod
    def forget(self, texts: Iterable[str]) -> ForgetReport:
        """Drop the states of documents."""

    @abstractmethod
    def flush(self) -> None:
        """Wait until the states that earlier calls made are where they are kept."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """What the store holds, its hits and misses by tier, and tokens saved and computed."""

    def settings(self) -> dict[str, Any]:
        """Return what the engine was made of, by the names of a language model's options."""
        return {
            "model": self.lm.name,
            "namespace": self.namespace,
            "preamble": self.preamble,
            "reuse": self.reuse,
            "repair": self.repair,
        }

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        reuse: ReuseMode | None = None,
        repair: float | None = None,
    ) -> Generation:
        """Answer at once; arguments and errors as for `stream`."""
        return Generation.of(list(self.stream(prompt, params, reuse, repair)))

    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        reuse: ReuseMode | None = None,
        repair: float | None = None,
    ) -> Generation:
        """Answer as `generate` does, without blocking the event loop."""
        chunks = self.astream(prompt, params, reuse, repair)
        return Generation.of([chunk async for chunk in chunks])

    def prompt_from_chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Prompt:
        """Render chat messages by the model's own template, markup as `literal` segments.

        tools: that the model may call; `tool_format` says how it does.
        Raises: ChatTemplateError: the model has no template, or it refuses the messages.
        """
        text = self.lm.text
        if not tools and not any(m.tool_calls or m.role == "tool" for m in messages):
            return render_chat(messages, text.apply_chat_template, text.control_tokens)
        return render_tool_chat(
            messages, tools, self.tool_format, text.apply_chat_template, text.control_tokens
        )

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model is told of tools and how it calls them."""
        return tool_format(self.lm.text.apply_chat_template, self.lm.text.is_special)

    def tokenise(self, prompt: Prompt) -> TokenisedPrompt:
        """Return the prompt's token ids, the same for every reuse mode."""
        return tokenise(prompt, self.lm.text.ids, self.lm.text.bos_ids)

    def _check_types(self, prompt: Prompt, params: SamplingParams) -> None:
        """Raises: PromptError: no prompt. OptionError: no parameters."""
        if not isinstance(prompt, Prompt):
            raise PromptError(
                f"prompt must be a Prompt, got {type(prompt).__name__}; "
                "for a flat string use Prompt.from_text(...)"
            )
        if not isinstance(params, SamplingParams):
            raise OptionError(f"params must be SamplingParams, got {type(params).__name__}")

    def _check_length(self, tokens: TokenisedPrompt) -> None:
        """Raises: PromptError: the prompt has no tokens."""
        if not tokens.token_ids:
            raise PromptError("the prompt has no tokens; give at least one character of text")

    def _mode(self, reuse: ReuseMode | None, repair: float | None) -> ReuseMode:
        """Return the mode that a request asks for.

        Raises: OptionError: an unknown mode, or a budget for one that repairs nothing.
        """
        mode = self.reuse if reuse is None else check_reuse(reuse)
        if check_repair(repair) is None or mode in REPAIR:
            return mode
        if reuse is not None:
            raise OptionError(
                f"reuse={reuse!r} repairs nothing, but repair= was given; "
                "use reuse='balanced', or leave one of them out"
            )
        return "balanced"
