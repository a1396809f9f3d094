"""What clients and the connector say to each other, in a request's `kv_transfer_params`.

A request for an answer names states that may stand for parts of its prompt, best first; an empty
list only asks for the description that comes with the answer:

    {"prompt_cache": [[start, end, key, preamble], [start, end, key, preamble, [more ids]], …]}

`key` is the digest of a `ModuleKey`; `preamble` names what the state was encoded after. Its tokens
are those from `start` to `end`, followed by the fifth item's where there is one: rows that the
prompt has no use for, such as the separator after its last document.

A request to keep what the server computes for `start … end` of the prompt, which begins with one of
the server's preambles and nothing else:

    {"prompt_cache_save": [start, end, key, preamble]}

`docs/vllm.md` tells the way of a request, and why nothing of this is trusted. Version 1 had a
number in the place of the preamble. Neither side takes the other version's words.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pcache_core.errors import PromptCacheError
from pcache_core.kv.key import KeySpace, ModuleKey, digest, pack_ids
from pcache_core.library.preamble import PreambleIds

VERSION = 2
LOAD = "prompt_cache"
SAVE = "prompt_cache_save"

LEAST_MODULE_TOKENS = 8
"""Shorter modules are computed in line; only the opening may be shorter."""
MOST_TAIL_TOKENS = 64

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST_TOKEN_ID = 2**31 - 1
# A client names three states for a place at most: as the prompt separates documents, as is usual,
# and without a separator. The rest of the fourth, and these tokens, are for tails and the opening.
_MOST_READINGS = 4
_MORE_TOKENS = 128
_MOST_RUNS = 4096


Preambles = Mapping[str, tuple[int, ...]]
"""Token ids of all that states may be encoded after, by name."""


class ProtocolError(PromptCacheError, ValueError):
    """Parameters that are not of this protocol."""


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens `start … end` of a prompt and the state that may stand for them.

    preamble: name of what the state was encoded after.
    tail: tokens of the state after `end`, which stay unused.
    """

    start: int
    end: int
    key: str
    preamble: str
    tail: tuple[int, ...] = ()

    def module_key(
        self, prompt_ids: Sequence[int], preambles: Preambles, space: KeySpace
    ) -> ModuleKey:
        """Make the key of these tokens; `key` is its digest, or the run is of something else."""
        own = (*prompt_ids[self.start : self.end], *self.tail)
        return space.key(preambles[self.preamble], own, None)

    def as_list(self) -> list[Any]:
        """Return it as in a request."""
        own: list[Any] = [self.start, self.end, self.key, self.preamble]
        return [*own, list(self.tail)] if self.tail else own


@dataclass(frozen=True, slots=True)
class Description:
    """A server's connector.

    model, dtype, namespace: of the keys it knows. preambles: their digest. context_length: the
    model's most positions, None without a limit; the server itself may take fewer.
    saves: whether it keeps states on request.
    refused: how often it did not do what a request asked for, by reason.
    """

    model: str
    dtype: str
    namespace: str
    preambles: str
    context_length: int | None
    saves: bool
    refused: Mapping[str, int]

    @property
    def key_space(self) -> KeySpace:
        """Makes the keys that the server knows."""
        return KeySpace(self.model, self.dtype, self.namespace)

    def as_dict(self) -> dict[str, Any]:
        """Return it as in an answer."""
        own = {name: getattr(self, name) for name in self.__slots__}
        return {LOAD: {"version": VERSION, **own, "refused": dict(self.refused)}}

    @classmethod
    def parse(cls, params: object) -> Description | None:
        """Read the description in an answer; None if it has none.

        Raises: ProtocolError: it is of another version.
        """
        own = params.get(LOAD) if isinstance(params, Mapping) else None
        if not isinstance(own, Mapping):
            return None
        if own.get("version") != VERSION or not own.keys() >= set(cls.__slots__):
            raise ProtocolError(
                f"the server speaks version {own.get('version')} of the prompt cache's protocol, "
                f"this client version {VERSION}; install the same pcache-integrations on both"
            )
        return cls(**{name: own[name] for name in cls.__slots__})


def named_preambles(ids: PreambleIds) -> Preambles:
    """Return all that states may be encoded after, by the names that runs have for it."""
    return {"": (), **ids.by_name()}


def preambles_digest(preambles: Preambles) -> str:
    """Return a digest that is equal where all preambles are."""
    fields = ((name.encode(), pack_ids(ids)) for name, ids in sorted(preambles.items()))
    return digest(part for both in fields for part in both)


def fast_salt(namespace: str) -> str:
    """Return the cache salt of prompts that are filled from states."""
    return f"prompt-cache.fast.{namespace}"


def exact_salt(namespace: str) -> str:
    """Return the cache salt of prompts that are computed."""
    return f"prompt-cache.exact.{namespace}"


def parse_runs(value: object, num_tokens: int, preambles: Preambles) -> tuple[Run, ...]:
    """Read a request's runs.

    There may be 4,096. Each costs its tokens, or 8 if it has fewer, and those of its tail; all of
    them together may cost four times the prompt's tokens and 128 more.

    Raises: ProtocolError: they are not runs, or not of a prompt this long, or cost too much.
    """
    if not isinstance(value, list | tuple) or len(value) > _MOST_RUNS:
        raise ProtocolError(f"{LOAD} must be a list of at most {_MOST_RUNS} runs")
    runs = tuple(parse_run(item, num_tokens, preambles) for item in value)
    cost = sum(max(LEAST_MODULE_TOKENS, run.end - run.start) + len(run.tail) for run in runs)
    most = _MOST_READINGS * num_tokens + _MORE_TOKENS
    if cost > most:
        raise ProtocolError(
            f"the runs cover {cost} tokens, at most {most} for a prompt of {num_tokens} tokens"
        )
    return runs


def parse_run(item: object, num_tokens: int, preambles: Preambles) -> Run:
    """Read one run; no message repeats what the client wrote. Raises: ProtocolError."""
    if not isinstance(item, list | tuple) or len(item) not in (4, 5):
        raise ProtocolError("a run must be [start, end, key, preamble], or have more token ids")
    start, end, key, preamble = item[:4]
    tail = item[4] if len(item) == 5 else ()
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= num_tokens:
        raise ProtocolError(f"a run must lie within the prompt's {num_tokens} tokens")
    if not isinstance(key, str) or not _DIGEST.fullmatch(key):
        raise ProtocolError("a run's key must be 64 hexadecimal digits")
    if not isinstance(preamble, str) or preamble not in preambles:
        raise ProtocolError(
            f"a run's preamble must be one of {', '.join(filter(None, preambles))}, or empty"
        )
    if start and not preamble:
        raise ProtocolError("only a run that begins the prompt is encoded after nothing")
    if not isinstance(tail, list | tuple) or len(tail) > MOST_TAIL_TOKENS:
        raise ProtocolError(f"a run may go on for at most {MOST_TAIL_TOKENS} tokens")
    if any(type(token) is not int or not 0 <= token <= _MOST_TOKEN_ID for token in tail):
        raise ProtocolError(f"token ids must be integers from 0 to {_MOST_TOKEN_ID}")
    return Run(start, end, key, preamble, tuple(tail))


def cover(runs: Iterable[Run], start: int) -> list[Run]:
    """Return the runs that together cover the prompt from `start` on without a gap, in order.

    Of several that go on from a place, the one that reaches furthest; of those, the one that begins
    first.
    """
    chosen: list[Run] = []
    waiting = deque(sorted(runs, key=lambda run: run.start))
    furthest: Run | None = None
    while True:
        while waiting and waiting[0].start <= start:
            run = waiting.popleft()
            if furthest is None or run.end > furthest.end:
                furthest = run
        if furthest is None or furthest.end <= start:
            return chosen
        chosen.append(furthest)
        start = furthest.end
