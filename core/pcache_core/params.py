"""How to generate: sampling parameters and reuse modes, validated when they are made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pcache_core.errors import OptionError
from pcache_core.grammar import Grammar

ReuseMode = Literal["off", "exact", "fast", "balanced", "high"]
REUSE_MODES: tuple[ReuseMode, ...] = get_args(ReuseMode)
DEFAULT_REUSE: ReuseMode = "balanced"
DEFAULT_MODEL = "builtin:smollm2"
StorageDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
"""How numbers are kept: `auto` as the model has them, `int8` with a scale per head and channel."""

MAX_LOGPROBS = 20
"""Most alternatives of a token whose log probabilities can be asked for."""
_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_reuse(mode: str) -> ReuseMode:
    """Return `mode` if it is a reuse mode. Raises: OptionError."""
    for known in REUSE_MODES:
        if mode == known:
            return known
    raise OptionError(f"unknown reuse mode {mode!r}; use one of {', '.join(REUSE_MODES)}")


def check_namespace(namespace: object) -> None:
    """Raises: OptionError: it has other characters than letters, digits and `._-`."""
    if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
        raise OptionError(
            f"namespace {namespace!r} is not valid; use 1 to 64 letters, digits, "
            "'.', '_' or '-', starting with a letter or digit"
        )


def check_storage_dtype(storage_dtype: object) -> StorageDtype:
    """Return it. Raises: OptionError: unknown."""
    for known in get_args(StorageDtype):
        if storage_dtype == known:
            return known  # type: ignore[no-any-return]
    raise OptionError(
        f"storage_dtype={storage_dtype!r} is unknown; use one of "
        f"{', '.join(map(repr, get_args(StorageDtype)))}"
    )


def check_repair(repair: float | None) -> float | None:
    """Return `repair` if it is a budget: an `int` counts tokens, a `float` is a share.

    Raises: OptionError: neither; out of range; the integer 1, which may mean either.
    """
    if repair is None:
        return None
    if isinstance(repair, bool) or not isinstance(repair, (int, float)):
        raise OptionError(
            f"repair must be a number of tokens such as 64, or a share of the reused tokens such "
            f"as 0.15, got {type(repair).__name__}"
        )
    if isinstance(repair, int):
        if repair == 1:
            raise OptionError(
                "repair=1 may mean two things; write repair=1.0 to compute all reused tokens "
                "again, or repair=2 (or more) for a number of tokens"
            )
        _check_range("repair", repair, 0, 2**31, "0 or more tokens")
    else:
        _check_range("repair", repair, 0, 1, "a share from 0.0 to 1.0, or a whole number of tokens")
    return repair


def repair_budget(repair: float | None, reusable: int) -> float:
    """Return how many of `reusable` tokens are computed again; not rounded if it is a share."""
    if repair is None:
        return 0
    return repair if isinstance(repair, int) else repair * reusable


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    max_tokens: most tokens to generate; the model's context may end generation before.
    temperature: 0 takes the likeliest token, as does anything below 1e-5; above that samples.
    top_p, top_k, min_p: keep the smallest set of tokens with this much probability; the k
        likeliest; those at least this likely relative to the likeliest. Defaults keep all.
    repetition_penalty: above 1 makes tokens of the prompt and of the answer less likely.
    stop: strings that end generation; neither they nor a part of them is returned.
    stop_token_ids: ids that end generation, beside the model's own end-of-sequence ids.
    seed: makes sampling repeatable.
    grammar: what the answer may be. It is complete when its tokens run out; a stop string or a
        stop token may cut it short.
    logprobs: report each token's log probability, and those of this many likeliest ones; None
        reports none. They are the model's own, before temperature, penalties and filters.
    timeout_s: seconds from the call until the answer has to be done; None for no limit.
    speculative: try several tokens in one forward where the text has gone on like this before, as
        answers do that quote their documents (prompt lookup). Only tokens that are chosen anyway
        are kept, so answers are the same, up to rounding. Beside more than a few running requests
        it is off. A server has its own setting.
    sources: report how much of the question's attention each document gets, in modes that don't
        observe it anyway (`balanced` and `high` do).

    Raises: OptionError: a value out of range; an empty stop string.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    seed: int | None = None
    grammar: Grammar | None = None
    logprobs: int | None = None
    timeout_s: float | None = None
    sources: bool = False
    speculative: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", ids)
        _check_range("max_tokens", self.max_tokens, 1, 2**31, "1 or more")
        _check_range("temperature", self.temperature, 0, None, "0 (greedy) or more")
        _check_range("top_p", self.top_p, 0, 1, "above 0, at most 1")
        if self.top_p == 0:
            raise OptionError("top_p=0 keeps no token; for greedy decoding use temperature=0")
        _check_range("top_k", self.top_k, 0, None, "0 (off) or more")
        _check_range("min_p", self.min_p, 0, 1, "from 0 to 1")
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100, "0.01 to 100")
        for text in stop:
            if not isinstance(text, str) or not text:
                raise OptionError(
                    f"stop strings must be non-empty, got {text!r} in stop={list(stop)!r}; "
                    "leave it out to generate to the end"
                )
        for token in self.stop_token_ids:
            _check_integer("stop_token_ids", token)
        _check_integer("max_tokens", self.max_tokens)
        _check_integer("top_k", self.top_k)
        if self.seed is not None:
            _check_integer("seed", self.seed)
            _check_range("seed", self.seed, 0, 2**63 - 1, "from 0 to 2**63 - 1")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise OptionError(
                f"grammar must be a Grammar, got {type(self.grammar).__name__}; "
                "for a JSON schema use Grammar.json(...)"
            )
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs)
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}")
        if self.timeout_s is not None:
            _check_range("timeout_s", self.timeout_s, 0.001, None, "0.001 seconds or more")
        _check_flag("sources", self.sources)
        _check_flag("speculative", self.speculative)


def _as_tuple(name: str, value: object) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise OptionError(f"{name} must be a list, got {value!r}")
    return tuple(value)


def _check_range(name: str, value: float, low: float, high: float | None, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionError(f"{name} must be a number, got {value!r}; use {allowed}")
    infinite = isinstance(value, float) and not math.isfinite(value)
    if infinite or value < low or (high is not None and value > high):
        raise OptionError(f"{name}={value!r} is out of range; use {allowed}")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise OptionError(f"{name} must be True or False, got {value!r}")


def _check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(f"{name} must be an integer, got {value!r}")


REPAIR: dict[ReuseMode, float] = {"balanced": 64, "high": 0.25}
"""What the modes that repair compute again: a number of tokens, or a share of the reused ones.

Measured on real models (`docs/concepts.md`): after the first few dozen tokens more win little,
whatever the prompt's length.
"""
