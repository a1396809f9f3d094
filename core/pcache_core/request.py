"""A request, checked before any weight is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pcache_core.errors import ContextLengthError, PromptError
from pcache_core.kv.key import PlannedState
from pcache_core.lm import CausalLM
from pcache_core.params import REPAIR, ReuseMode, SamplingParams
from pcache_core.prompt import Prompt, TokenisedPrompt

_USUAL_ANSWER_TOKENS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A checked request: nothing in it can be wrong any more.

    reuse: the mode that can run; `fallback_reason` says why it is not the one asked for.
    repair: how many reused tokens are computed again, see `check_repair`; None for modes that
        repair nothing.
    states: that may fill its rows; none in modes that reuse no modules.
    weights: version of the weights that the states are named by.
    """

    tokens: TokenisedPrompt
    params: SamplingParams
    reuse: ReuseMode
    fallback_reason: str | None
    repair: float | None
    states: tuple[PlannedState, ...] = ()
    weights: int = 0

    @property
    def observes(self) -> bool:
        """Whether to look how much of the question's attention each part of the prompt gets."""
        return self.params.sources or self.repair is not None

    @property
    def fresh_rows(self) -> int:
        """How many of the last rows are computed in any case: for logits, and to be observed."""
        behind, _ = self.tokens.question
        return max(1, len(self.tokens.token_ids) - behind) if self.params.sources else 1

    @property
    def capacity(self) -> int:
        """Rows to begin with: the prompt's and those of an answer of usual length."""
        return len(self.tokens.token_ids) + min(self.params.max_tokens, _USUAL_ANSWER_TOKENS)


def check_request(
    lm: CausalLM,
    tokens: TokenisedPrompt,
    prompt: Prompt,
    params: SamplingParams,
    mode: ReuseMode,
    repair: float | None,
) -> Request:
    """See that the model can run a prompt of these tokens.

    tokens: of the prompt. repair: used instead of the mode's own budget, if the mode repairs
        at all.

    Raises: PromptError: it was laid out for another model. ContextLengthError: too many tokens.
        OptionError: too few tokens may be generated for any text of the grammar.
    """
    if prompt.placement is not None and prompt.placement.model != lm.fingerprint:
        raise PromptError(
            f"the prompt was laid out for another model than {lm.name}; make it with "
            "prompt_from_pml of the engine that runs it"
        )
    lm.check_ids(tokens.token_ids)
    limit = lm.context_length
    if limit is not None:
        _check_fits(lm, tokens, limit)
        # The last token that is generated needs no row of its own.
        params = replace(params, max_tokens=min(params.max_tokens, limit - tokens.end + 1))
    lm.check_grammar(params)
    possible, reason = _possible(lm, mode, tokens.end)
    budget = REPAIR.get(possible)
    if budget is not None and repair is not None:
        budget = repair
    return Request(tokens, params, possible, reason or prompt.fallback_reason, budget)


def check_continuation(lm: CausalLM, request: Request, token_ids: Sequence[int]) -> None:
    """Raises: ModelError: an id that the model has not. ContextLengthError: no room for them."""
    lm.check_ids(token_ids)
    room = request.params.max_tokens  # the context's rest, if that is less
    if len(token_ids) > room:
        raise ContextLengthError(
            f"the continuation has {len(token_ids)} tokens, but after the prompt {lm.name} has "
            f"room for {room}; use a shorter one, or fewer or shorter documents"
        )


def _check_fits(lm: CausalLM, tokens: TokenisedPrompt, limit: int) -> None:
    """Raises: ContextLengthError: a token stands after the last position."""
    length = len(tokens.token_ids)
    if length > limit:
        raise ContextLengthError(
            f"the prompt has {length} tokens, {lm.name} holds {limit}; "
            "use fewer or shorter documents"
        )
    if tokens.end > limit:
        raise ContextLengthError(
            f"the schema's positions reach {tokens.end}, {lm.name} holds {limit}; "
            "use positions='compact', or a smaller schema"
        )


def _possible(lm: CausalLM, mode: ReuseMode, length: int) -> tuple[ReuseMode, str | None]:
    """Return the mode that can run, and why not the one asked for (unsupported means exact)."""
    if mode == "off":
        return mode, None
    if lm.support.kind == "no-cache":
        return "off", lm.support.reason
    if lm.support.is_beyond_stable(length):
        return "off", (
            f"beyond {lm.support.stable_length} tokens the model's rotary frequencies depend on "
            "the prompt's length"
        )
    if mode != "exact" and not lm.support.reuses_modules:
        return "exact", lm.support.reason
    return mode, None
