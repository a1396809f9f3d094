"""What clients and the connector say to each other, in a request's `kv_transfer_params`.

A request for an answer names states that may stand for parts of its prompt, best first; the
answer's parameters describe the connector. An empty list only asks for that description:

    {"prompt_cache": [[start, end, key, preamble], [start, end, key, preamble, [more ids]], …]}

`key` names a state in the server's store: the digest of a `ModuleKey`. `preamble` names what it
was encoded after: `opening` for the preamble's opening alone, a language such as `en` for its
company in that language, `all` where one company is for all; empty for the prompt's own opening,
which is encoded after nothing. Its tokens are those from `start` to `end`, followed by the fifth
item's where there is one: rows that the prompt has no use for, such as the separator after its last
document. So the server makes every key itself, from its own preambles, and uses none that is
another's.

A request to keep what the server computes for `start … end` of the prompt, which begins with one of
the server's preambles and nothing else, as the state `key`:

    {"prompt_cache_save": [start, end, key, preamble]}

Prompts that are filled from states carry the cache salt of `fast_salt`, so that no prompt that was
promised exact keys and values ever finds theirs in the server's prefix cache.

Version 1 had a number in the place of the preamble. Neither side takes the other version's words:
its prompts are computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pcache_core.errors import PromptCacheError
from pcache_core.kv.key import KeySpace, ModuleKey, digest, pack_ids
from pcache_core.library.preamble import PreambleIds

VERSION = 2
LOAD = "prompt_cache"
SAVE = "prompt_cache_save"

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST_RUNS = 4096
_MOST_TAIL_TOKENS = 64


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
        """The key that these tokens make; `key` is its digest, or the run is of something else."""
        own = (*prompt_ids[self.start : self.end], *self.tail)
        return space.key(preambles[self.preamble], own, None)

    def as_list(self) -> list[Any]:
        """As in a request."""
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
        """As in an answer."""
        own = {name: getattr(self, name) for name in self.__slots__}
        return {LOAD: {"version": VERSION, **own, "refused": dict(self.refused)}}

    @classmethod
    def parse(cls, params: object) -> Description | None:
        """The description in an answer; None if it has none.

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
    """All that states may be encoded after, by the names that runs have for it."""
    return {"": (), **ids.by_name()}


def preambles_digest(preambles: Preambles) -> str:
    """A digest that is equal where all preambles are."""
    fields = ((name.encode(), pack_ids(ids)) for name, ids in sorted(preambles.items()))
    return digest(part for both in fields for part in both)


def fast_salt(namespace: str) -> str:
    """The cache salt of prompts that are filled from states."""
    return f"prompt-cache.fast.{namespace}"


def exact_salt(namespace: str) -> str:
    """The cache salt of prompts that are computed."""
    return f"prompt-cache.exact.{namespace}"


def parse_runs(value: object, num_tokens: int, preambles: Preambles) -> tuple[Run, ...]:
    """A request's runs. Raises: ProtocolError: they are none, or not of a prompt this long."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) > _MOST_RUNS:
        raise ProtocolError(f"{LOAD} must be a list of at most {_MOST_RUNS} runs")
    return tuple(parse_run(item, num_tokens, preambles) for item in value)


def parse_run(item: object, num_tokens: int, preambles: Preambles) -> Run:
    """One run. Raises: ProtocolError."""
    if not isinstance(item, Sequence) or isinstance(item, str) or len(item) not in (4, 5):
        raise ProtocolError("a run must be [start, end, key, preamble], or have more token ids")
    start, end, key, preamble = item[:4]
    tail = item[4] if len(item) == 5 else ()
    if any(type(place) is not int for place in (start, end)) or not 0 <= start < end <= num_tokens:
        raise ProtocolError(f"a run from {start!r} to {end!r} is not within {num_tokens} tokens")
    if not isinstance(key, str) or not _DIGEST.fullmatch(key):
        raise ProtocolError("a run's key must be 64 hexadecimal digits")
    if not isinstance(preamble, str) or preamble not in preambles:
        raise ProtocolError(
            f"a run's preamble must be one of {', '.join(filter(None, preambles))}, or empty; "
            f"got {preamble!r:.40}"
        )
    if start and not preamble:
        raise ProtocolError("only a run that begins the prompt is encoded after nothing")
    if not isinstance(tail, Sequence) or len(tail) > _MOST_TAIL_TOKENS:
        raise ProtocolError(f"a run may go on for at most {_MOST_TAIL_TOKENS} tokens")
    if any(type(token) is not int or token < 0 for token in tail):
        raise ProtocolError("token ids must be integers from 0 up")
    return Run(start, end, key, preamble, tuple(tail))


def cover(runs: Sequence[Run], start: int, is_there: Callable[[Run], bool]) -> list[Run]:
    """The runs that together cover the prompt from `start` on without a gap, in order.

    Of several that go on from a place, the one that reaches furthest; of those, the first.
    """
    chosen: list[Run] = []
    reached = start
    while True:
        longer = [run for run in runs if run.start <= reached < run.end and is_there(run)]
        if not longer:
            return chosen
        chosen.append(max(longer, key=lambda run: run.end))
        reached = chosen[-1].end
