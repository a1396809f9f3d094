"""Whether a state is worth loading: the time that takes against that of computing it again."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

from pcache_core.errors import OptionError
from pcache_core.store import Offer, Tier

# What a measurement counts for after one more: the last ten or so decide.
_DECAY = 0.9
# Of a speed that was given instead of measured: as much as a second of loading or computing.
_GIVEN_MS = 1000.0
# A difference that measurements can't tell from noise; a state that is loaded serves again, too.
_LEAST_GAIN_MS = 1.0
# Loads that took less together, the last ten or so, are quick enough, or a hiccup.
_LEAST_LOADING_MS = 50.0
# A tier that was slow may be fast again; nothing else would find out.
_TRY_AGAIN_AFTER = 32
# Less than this says more about a forward's fixed cost than about what a token costs.
_LEAST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Declined:
    """A state that was there and was computed instead, and why.

    load_ms, compute_ms: what either would have taken, as expected.
    """

    tier: Tier
    nbytes: int
    load_ms: float
    compute_ms: float

    def __str__(self) -> str:
        return (
            f"not loaded from {self.tier}: {self.nbytes:,} bytes would take about "
            f"{self.load_ms:.0f} ms, computing {self.compute_ms:.0f} ms"
        )


@runtime_checkable
class Admission(Protocol):
    """Decides which stored states are loaded. Called from several threads."""

    def declines(self, offer: Offer) -> Declined | None:
        """Why the state is not worth loading; None if it is."""

    def loaded(self, tier: Tier, nbytes: int, elapsed_ms: float) -> None:
        """States of a tier were read."""

    def computed(self, num_tokens: int, elapsed_ms: float) -> None:
        """Tokens ran through the model."""


class Always:
    """Loads every state that is there, so that answers do not depend on this machine's speed."""

    def declines(self, offer: Offer) -> Declined | None:
        """Never."""

    def loaded(self, tier: Tier, nbytes: int, elapsed_ms: float) -> None:
        """Nothing to learn."""

    def computed(self, num_tokens: int, elapsed_ms: float) -> None:
        """Nothing to learn."""


class Measured:
    """Loads a state if that takes no longer than computing its tokens, a millisecond aside.

    Speeds are exponential averages of what this process saw; larger pieces of work count for more.
    As long as nothing is known of a tier, or of the model, and while the last ten or so loads took
    less than 50 ms together, states are loaded. Every 32nd state that a slow tier offers is loaded
    all the same, in case it has become faster. What memory holds is never computed instead. A token
    that is computed is exact, so no answer gets worse by this.

    bytes_per_s, tokens_per_s: speeds to begin with, by tier and of the model; measurements replace
        them within some seconds of work.
    Raises: OptionError: a speed that is not above 0, or of no tier that loads.
    """

    def __init__(
        self,
        bytes_per_s: Mapping[Tier, float] | None = None,
        tokens_per_s: float | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._loads: dict[Tier, _Speed] = {}
        self._model = _Speed()
        self._declined: dict[Tier, int] = {}
        for tier, speed in (bytes_per_s or {}).items():
            if tier not in get_args(Tier) or tier == "memory":
                raise OptionError(f"bytes_per_s is of 'disk' or 'remote', got {tier!r}")
            self._loads[tier] = _Speed.given(f"bytes_per_s of {tier}", speed)
        if tokens_per_s is not None:
            self._model = _Speed.given("tokens_per_s", tokens_per_s)

    def declines(self, offer: Offer) -> Declined | None:
        """Why the state is not worth loading; None if it is."""
        if offer.tier == "memory":
            return None
        with self._lock:
            speed = self._loads.get(offer.tier, _UNKNOWN)
            load_ms = speed.expected_ms(offer.nbytes) if speed.is_slow_enough else None
            compute_ms = self._model.expected_ms(len(offer.key.token_ids))
            if load_ms is None or compute_ms is None or load_ms <= compute_ms + _LEAST_GAIN_MS:
                return None
            count = self._declined[offer.tier] = self._declined.get(offer.tier, 0) + 1
            if count % _TRY_AGAIN_AFTER == 0:
                return None
            return Declined(offer.tier, offer.nbytes, load_ms, compute_ms)

    def loaded(self, tier: Tier, nbytes: int, elapsed_ms: float) -> None:
        """States of a tier were read and copied to where they are used."""
        with self._lock:
            self._loads.setdefault(tier, _Speed()).add(nbytes, elapsed_ms)

    def computed(self, num_tokens: int, elapsed_ms: float) -> None:
        """Tokens ran through the model in one forward; few tell nothing and are left out."""
        if num_tokens < _LEAST_TOKENS:
            return
        with self._lock:
            self._model.add(num_tokens, elapsed_ms)


AdmissionName = Literal["measured", "always"]


def check_admission(admission: object) -> Admission:
    """What decides: `measured`, `always`, or an object that does. Raises: OptionError: neither."""
    if admission == "measured":
        return Measured()
    if admission == "always":
        return Always()
    if isinstance(admission, Admission) and not isinstance(admission, type):
        return admission
    raise OptionError(
        f"admission={admission!r} must be 'measured', 'always' or an object with "
        "`declines`, `loaded` and `computed`, such as Measured(bytes_per_s=…)"
    )


class _Speed:
    """An amount of work and the time it took, older work counting for less."""

    def __init__(self, amount: float = 0.0, elapsed_ms: float = 0.0) -> None:
        self._amount = amount
        self._elapsed_ms = elapsed_ms

    @staticmethod
    def given(name: str, per_second: object) -> _Speed:
        """Raises: OptionError: not a number above 0."""
        number = isinstance(per_second, (int, float)) and not isinstance(per_second, bool)
        if not number or not 0 < per_second < float("inf"):  # type: ignore[operator]
            raise OptionError(f"{name} must be a number above 0, got {per_second!r}")
        return _Speed(per_second * _GIVEN_MS / 1000, _GIVEN_MS)  # type: ignore[operator]

    def add(self, amount: float, elapsed_ms: float) -> None:
        self._amount = _DECAY * self._amount + amount
        self._elapsed_ms = _DECAY * self._elapsed_ms + elapsed_ms

    @property
    def is_slow_enough(self) -> bool:
        """Whether it took long enough to be worth a thought."""
        return self._elapsed_ms >= _LEAST_LOADING_MS

    def expected_ms(self, amount: float) -> float | None:
        """None while nothing is known."""
        return amount * self._elapsed_ms / self._amount if self._amount else None


_UNKNOWN = _Speed()
