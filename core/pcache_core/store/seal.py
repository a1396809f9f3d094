"""The last bytes of a stored state: a checksum against damage, or an HMAC against forgery."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

import xxhash

from pcache_core.errors import OptionError

SEAL_BYTES: Mapping[str, int] = MappingProxyType({"xxh3-128": 16, "hmac-sha256": 32})
_MIN_KEY_BYTES = 16


if TYPE_CHECKING:
    Hash: TypeAlias = xxhash.xxh3_128 | hmac.HMAC


class Seal:
    """Seals and checks stored states.

    hmac_key: a secret of 16 bytes or more. States that were sealed without it are not served, so
        that nobody who can write to the store can plant one. Without a key the seal finds damage,
        not intent.
    Raises: OptionError: the key is not bytes or too short.
    """

    def __init__(self, hmac_key: bytes | None = None) -> None:
        if hmac_key is not None and (
            not isinstance(hmac_key, bytes) or len(hmac_key) < _MIN_KEY_BYTES
        ):
            got = f"{len(hmac_key)} bytes" if isinstance(hmac_key, bytes) else type(hmac_key)
            raise OptionError(
                f"hmac_key must be {_MIN_KEY_BYTES} bytes or more, got {got}; "
                "make one with secrets.token_bytes(32)"
            )
        self._key = hmac_key
        self.name = "xxh3-128" if hmac_key is None else "hmac-sha256"

    @property
    def nbytes(self) -> int:
        """Length of a seal."""
        return SEAL_BYTES[self.name]

    def of(self, buffers: Iterable[memoryview]) -> bytes:
        """Return the seal of the buffers' bytes, one after another."""
        state = self.start()
        for buffer in buffers:
            state.update(buffer)
        return state.digest()

    def start(self) -> Hash:
        """Return what makes a seal when it has been given every byte, for `fits`."""
        if self._key is None:
            return xxhash.xxh3_128()
        return hmac.new(self._key, digestmod=hashlib.sha256)

    @staticmethod
    def fits(state: Hash, seal: memoryview) -> bool:
        """Whether `seal` is that of what `state` was given; takes as long wherever they differ."""
        return hmac.compare_digest(state.digest(), bytes(seal))
