"""The engine: prompts in, answers out, with every reusable part of the prompt reused.

A request is `stream`, then `_answer`: its sequence begins with the longest known prefix, states
fill the rows of modules, the rest is computed in one forward (and what is repaired in a second
one), and decoding goes on from the logits. Everything else here is bookkeeping.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pcache_core.base_engine import Engine, EngineStats
from pcache_core.decode import Decoder, follow
from pcache_core.errors import BudgetError, OptionError
from pcache_core.generate import AnswerText, TokenScorer, decode_loop
from pcache_core.kv.sequence import KVSequence
from pcache_core.library.preamble import Preamble
from pcache_core.library.states import ModuleLibrary
from pcache_core.lm import CausalLM
from pcache_core.params import DEFAULT_REUSE, ReuseMode, SamplingParams
from pcache_core.plan import plan_prefill, plan_states
from pcache_core.pml import Positions, PromptTree, Schema
from pcache_core.precompute import forget, precompute, precompute_units
from pcache_core.prefill import prefill
from pcache_core.prefix_cache import PrefixCache
from pcache_core.prompt import Prompt
from pcache_core.rank import ranking_prompts, scores_of
from pcache_core.report import Chunk, EncodeReport, ForgetReport, Prefill, Report
from pcache_core.request import Request, check_continuation, check_request
from pcache_core.scheduler import Scheduler
from pcache_core.schemas import SchemaShelf
from pcache_core.store import MemoryStore, ModuleStore, TieredStore
from pcache_core.store.base import ms_since


class PromptCacheEngine(Engine):
    """Runs prompts over precomputed attention states of their parts.

    store: where states are kept; a `MemoryStore` of the default budget if not given.
    reuse: the mode of requests that don't name one: `off` reuses nothing, `exact` the longest
        prefix that an earlier request left, `fast` also the state of every module, in any order;
        `balanced` computes the few of these tokens again that the question attends to most, `high`
        a share of them.
    namespace: part of every key; engines of different namespaces never share a state.
    preamble: what modules are encoded after; None for the model's own. See `Preamble`.
    repair: how much `balanced` and `high` compute again, instead of their own choice: an `int`
        counts tokens, a `float` is a share of the reused ones. Where that is half of them or more,
        all are computed.
    min_module_tokens: shorter documents are computed in line.
    prefix_budget_bytes: how much keys and values of finished requests may take, which later
        prompts that begin alike go on from; the last one's are kept whatever their size.
    max_running, max_waiting: requests that work at the same time, and how many more may wait for
        that; one beyond is refused with an OverloadedError.

    Requests of several threads and tasks share forwards, and documents that they have in common.

    Raises: OptionError: unknown mode, bad namespace. BudgetError: the store can't hold one token.
    """

    lm: CausalLM

    def __init__(  # noqa: PLR0913 (each is an option of the engine)
        self,
        lm: CausalLM,
        store: ModuleStore | None = None,
        reuse: ReuseMode = DEFAULT_REUSE,
        namespace: str = "default",
        preamble: Preamble | None = None,
        repair: float | None = None,
        *,
        min_module_tokens: int = 8,
        prefix_budget_bytes: int = 2**30,
        max_running: int = 16,
        max_waiting: int = 65_536,
    ) -> None:
        if not isinstance(lm, CausalLM):
            raise OptionError(
                f"lm must be a CausalLM, got {type(lm).__name__}; "
                "load one with CausalLM.from_pretrained(...)"
            )
        for name, value, least in (
            ("min_module_tokens", min_module_tokens, 1),
            ("max_running", max_running, 1),
            ("max_waiting", max_waiting, 0),
            ("prefix_budget_bytes", prefix_budget_bytes, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{name}={value!r} must be an integer, {least} or more")
        self.store: ModuleStore = MemoryStore() if store is None else store
        if not isinstance(self.store, ModuleStore):
            kind = type(store).__name__
            raise OptionError(f"store must be a ModuleStore such as MemoryStore(), got {kind}")
        super().__init__(lm, reuse, namespace, preamble, repair)
        self.min_module_tokens = min_module_tokens
        if self.most_state_tokens == 0:
            raise BudgetError(
                f"the store's budget of {self.store.stats().budget_bytes:,} bytes can't hold a "
                f"state of even one token, which takes {lm.bytes_per_token:,} bytes with "
                f"{lm.name}; raise budget_bytes"
            )
        self._library = ModuleLibrary(lm, self.store, namespace, preamble)
        self._prefix_cache = PrefixCache(lm, prefix_budget_bytes)
        self._scheduler = Scheduler(lm, max_running, max_waiting)
        self._schemas = SchemaShelf(lm)

    @property
    def preamble(self) -> Preamble:
        """What modules are encoded after."""
        return self._library.preambles.preamble

    @property
    def fingerprint(self) -> str:
        """Digest of the model's configuration and weights; the first use reads them all."""
        return self.lm.fingerprint

    @property
    def most_state_tokens(self) -> int | None:
        """Tokens of the largest state that the store's budget holds."""
        budget = self.store.stats().budget_bytes
        if budget is None or not self.lm.support.reuses_modules:
            return None
        return budget // self.lm.bytes_per_token

    def settings(self) -> dict[str, Any]:
        """Return what the engine was made of, by the names of a language model's options."""
        return {
            **super().settings(),
            "dtype": str(self.lm.dtype).removeprefix("torch."),
            "device": str(self.lm.device),
            "storage_dtype": getattr(self.store, "storage_dtype", "auto"),
        }

    def preamble_for(self, text: str) -> tuple[int, ...]:
        """Return the ids that a module of this text is encoded after."""
        return self._library.preambles.ids_for(text)

    def encode(
        self,
        texts: Sequence[str],
        progress: bool = True,  # noqa: FBT001, FBT002 (the published signature)
    ) -> EncodeReport:
        """Precompute the states of documents, many in one forward.

        These are the states that a prompt of these documents makes by itself: one of each for
        prompts that it comes first in, and one for all others.

        Raises: PromptError: `texts` is one string or holds something else. ContextLengthError: a
            text is longer than the context. BudgetError: a state is larger than the store's
            budget. All before any work.
        """
        return precompute(self._library, texts, self.min_module_tokens, progress=progress)

    def forget(self, texts: Iterable[str]) -> ForgetReport:
        """Drop the states of documents.

        Found are those in memory and in folders, whoever made them, and on a server those of this
        engine's preamble. What recent requests computed goes with newer requests.

        Raises: PromptError: `texts` is one string. StoreError: a folder can't be read.
        """
        return forget(self._library, texts)

    def flush(self) -> None:
        """Wait until every tier of the store has the states that were made so far."""
        if isinstance(self.store, TieredStore):
            self.store.flush()

    def clear(self) -> None:
        """Drop every state and every prefix of this engine: of its model in its namespace.

        Also those of weights that the model had before. States on a server stay; they have their
        own time limit.
        Raises: StoreError: a folder can't be read.
        """
        self._library.clear()
        self._prefix_cache.clear()

    def prefill(
        self,
        prompt: Prompt,
        reuse: ReuseMode | None = None,
        repair: float | None = None,
        continuation: Sequence[int] = (),
        *,
        sources: bool = False,
    ) -> Prefill:
        """Read a prompt and return the logits of the token after it.

        continuation: token ids to go on with, whatever the model would have chosen; it is asked how
            likely each of them was. sources: as in `SamplingParams`.
        Raises: ContextLengthError, OptionError, PromptError: before any work.
        """
        started = time.perf_counter()
        params = SamplingParams(max_tokens=max(1, len(continuation)), sources=sources)
        request = self._check(prompt, params, reuse, repair)
        check_continuation(self.lm, request, continuation)

        def read(asked_at: float) -> Generator[Prefill, None, None]:
            planned = self._plan(request)
            with self._prefix_cache.sequence(planned) as sequence:
                logits, report = self._read(planned, sequence)
                report.ttft_ms = ms_since(asked_at)
                logprobs = tuple(follow(self.lm, sequence, logits, continuation))
            yield Prefill(logits, report, logprobs)

        spent_s = time.perf_counter() - started
        (found,) = self._scheduler.run(read, spent_s=spent_s, timeout_s=None)
        self.reports.append(found.report)
        return found

    def rank(self, question: str, documents: Sequence[str]) -> list[float]:
        """Score documents by the attention that the question pays to them.

        Documents that were encoded before are not read again, and a prompt finds those that are
        encoded here. More than the model's context holds are ranked in parts.
        Returns: of each document its share, from 0 to 1, of the question's attention to the whole
            prompt, see `SegmentReport`. Parts compare roughly: documents of a smaller or weaker
            part get a little more.
        Raises: PromptError: no question, or something else than texts. ModelError: the model's
            attention can't be observed. ContextLengthError: a document is longer than the context.
        """
        prompts = ranking_prompts(self.lm, question, documents)
        reports = (self.prefill(prompt, "fast", sources=True).report for prompt in prompts)
        return scores_of(reports, len(documents))

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        reuse: ReuseMode | None = None,
        repair: float | None = None,
    ) -> Generator[Chunk, None, None]:
        """Answer piece by piece. The last chunk has `finish_reason` and `report`.

        reuse, repair: for this request, instead of the engine's; `repair` alone means `balanced`.
        The prompt is checked at once and read when the first chunk is asked for.

        Raises: ContextLengthError, OptionError, PromptError: before any work. OverloadedError:
            too many requests wait. DeadlineExceededError: `params.timeout_s` has passed.
        """
        started = time.perf_counter()
        request = self._check(prompt, params or SamplingParams(), reuse, repair)
        return self._scheduler.run(
            partial(self._answer, request),
            spent_s=time.perf_counter() - started,
            timeout_s=request.params.timeout_s,
        )

    async def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        reuse: ReuseMode | None = None,
        repair: float | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Answer as `stream` does, without blocking the event loop."""
        chunks = self._scheduler.run_in_thread(
            lambda: self.stream(prompt, params, reuse, repair),
            timeout_s=params.timeout_s if isinstance(params, SamplingParams) else None,
        )
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    def add_schema(
        self,
        schema: str | os.PathLike[str] | Schema,
        *,
        src_root: str | os.PathLike[str] | None = None,
    ) -> str:
        """Make a schema known, in place of any of the same name; returns its name.

        schema: PML text, the path of a file, or a tree. src_root: the folder that `src=` may read
            from; without it `src=` is refused.
        Raises: PMLError: it is not a schema, with file and line.
        """
        return self._schemas.add(schema, src_root)

    def prompt_from_pml(
        self, prompt: str | os.PathLike[str] | PromptTree, *, positions: Positions = "schema"
    ) -> Prompt:
        """Return a prompt of a schema that was added before.

        prompt: PML text, the path of a file, or a tree. positions: `schema`: as the schema lays
            them out, with gaps where the prompt leaves something out; `compact`: one after the
            other, for models whose states can be moved. What a model can't do is done otherwise,
            and `Report.fallback_reason` says so.
        Raises: PMLError: it is not a prompt, of no known schema, or doesn't fit it. OptionError:
            unknown `positions`.
        """
        return self._schemas.prompt(prompt, positions)

    def encode_schema(
        self,
        name: str,
        progress: bool = True,  # noqa: FBT001, FBT002 (as `encode`)
    ) -> EncodeReport:
        """Precompute the states of all modules of a schema, many in one forward.

        Raises: PMLError: no schema of that name. ContextLengthError, BudgetError: a module is too
            long. All before any work.
        """
        return precompute_units(
            self._library,
            map(self.tokenise, self._schemas.every_module(name)),
            self.min_module_tokens,
            progress=progress,
        )

    def kv_bytes(self) -> int:
        """Bytes of running requests' keys and values, shared ones once; beside finished ones'."""
        return self._prefix_cache.nbytes

    def stats(self) -> EngineStats:
        """What the store holds, its hits and misses by tier, and tokens saved and computed."""
        library, gate = self._library, self._scheduler.gate
        return EngineStats.of(
            self.store.stats(),
            self.reports,
            encoded_tokens=library.encoded_tokens,
            encode_ms=library.encode_ms,
            running=gate.running,
            waiting=gate.waiting,
        )

    def _check(
        self,
        prompt: Prompt,
        params: SamplingParams,
        reuse: ReuseMode | None,
        repair: float | None,
    ) -> Request:
        mode = self._mode(reuse, repair)
        self._check_types(prompt, params)
        tokens = self.tokenise(prompt)
        self._check_length(tokens)
        budget = self.repair if repair is None else repair
        return check_request(self.lm, tokens, prompt, params, mode, budget)

    def _plan(self, request: Request) -> Request:
        """Name the states that may fill the request's rows, by the weights as they are now."""
        request = replace(request, weights=self._library.follow_weights())
        if request.reuse in ("off", "exact"):
            return request
        states = plan_states(request.tokens, self._library, self.min_module_tokens)
        return replace(request, states=states)

    def _answer(self, request: Request, asked_at: float) -> Generator[Chunk, None, None]:
        request = self._plan(request)
        with self._prefix_cache.sequence(request) as sequence:
            logits, report = self._read(request, sequence)
            report.ttft_ms = ms_since(asked_at)
            yield from self._decode(request, sequence, logits, report)

    def _read(self, request: Request, sequence: KVSequence) -> tuple[torch.Tensor, Report]:
        """Bring the prompt into the sequence; return the next token's logits, [vocab]."""
        plan = plan_prefill(request, sequence)
        loaded = self._library.load(plan.states, sequence, len(request.tokens.token_ids))
        return prefill(self.lm, plan, loaded, sequence)

    def _decode(
        self, request: Request, sequence: KVSequence, logits: torch.Tensor, report: Report
    ) -> Generator[Chunk, None, None]:
        """Generate from the logits on; the last chunk has the report."""
        params = request.params
        decoder = Decoder(self.lm, sequence, params, lambda: self._scheduler.gate.running)
        count = 0
        for chunk in decode_loop(
            request.tokens.token_ids,
            logits,
            step=decoder,
            choose=self.lm.sampler(params),
            text=AnswerText(self.lm.text.decode, params.stop),
            end_ids=self.lm.end_ids | self.lm.stop_ids(params.stop) | set(params.stop_token_ids),
            max_tokens=params.max_tokens,
            score=TokenScorer(self.lm.text.decode, params.logprobs),
        ):
            count += len(chunk.token_ids)
            if chunk.finish_reason is not None:
                report.generated_tokens = count
                report.drafted_tokens = decoder.drafted_tokens
                report.accepted_tokens = decoder.accepted_tokens
                self.reports.append(report)
                chunk = replace(chunk, report=report)
            yield chunk
