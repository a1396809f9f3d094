"""What a benchmark found: samples, their medians, and the whole as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

Order = Literal["cold", "same", "new", "floor"]
"""What is known of a prompt: nothing; its documents in this order; its documents in another."""

Kind = Literal["ours", "floor", "peer"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed request.

    first_token: its id; -1 where it is not known. decode_tokens_per_s: of the tokens behind the
    first; None where there was only one. parts_ms: where `ttft_ms` went, as far as it is known.
    """

    ttft_ms: float
    prompt_tokens: int
    cached_tokens: int
    first_token: int = -1
    decode_tokens_per_s: float | None = None
    parts_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and most of some samples."""

    p50: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Row:
    """One way of asking, at one length, over all rounds.

    speedup: TTFT of `off` over this one's, the median of the rounds' ratios. above_floor: TTFT
    over that of the bare forward with keys and values in place, likewise. agreement: share of
    rounds in which the first token was that of `off` for the same prompt; None where `off` was not
    asked the same, or the way tells no ids.
    """

    cached_size: int
    order: Order
    way: str
    kind: Kind
    prompt_tokens: int
    cached_tokens: float
    ttft_ms: Spread
    speedup: float
    above_floor: float
    decode_tokens_per_s: Spread | None
    agreement: float | None
    parts_ms: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Encoding:
    """Encoding documents ahead, beside the model's own padded forward over the same documents.

    share: of the forward's tokens/s, the median of the rounds' ratios. forward_batch: the number
    of documents in a forward that was fastest.
    """

    cached_size: int
    tokens_per_s: Spread
    forward_tokens_per_s: Spread
    forward_batch: int
    share: float


@dataclass(frozen=True, slots=True)
class Concurrency:
    """Requests over the same documents, each in an order of its own, at once and in turn.

    speedup: median of the rounds' ratios. kv_bytes: the most that all requests held at once, what
    they share counted once. separate_kv_bytes: what as many separate copies take.
    """

    cached_size: int
    requests: int
    alone_tokens_per_s: Spread
    at_once_tokens_per_s: Spread
    speedup: float
    kv_bytes: int
    separate_kv_bytes: int


@dataclass(frozen=True, slots=True)
class Line:
    """A straight line through TTFT against cached tokens, by least squares."""

    way: str
    us_per_token: float
    intercept_ms: float
    r_squared: float


@dataclass(frozen=True, slots=True)
class PeerState:
    """A peer and what became of it. problem: None where it ran to the end."""

    name: str
    version: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A finished benchmark. `table.Report` prints it, `as_json` is for machines."""

    model: str
    parameters: int
    kv_bytes_per_token: int
    stored_bytes_per_token: float | None
    options: Mapping[str, Any]
    environment: Mapping[str, str | int]
    rows: tuple[Row, ...]
    encoding: tuple[Encoding, ...]
    concurrency: tuple[Concurrency, ...]
    growth: tuple[Line, ...]
    peers: tuple[PeerState, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """One object; times in milliseconds."""
        return asdict(self)
