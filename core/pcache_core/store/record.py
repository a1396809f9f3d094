"""What a stored state says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pcache_core.errors import StateMismatchError
from pcache_core.kv.key import FORMAT_VERSION, ModuleKey
from pcache_core.kv.state import KVState, LayerShape, Stack
from pcache_core.params import StorageDtype
from pcache_core.store.seal import SEAL_BYTES

_TEXT_TOKENS = 64
_TEXT_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class Record:
    """The header of a stored state.

    digest, token_ids: of its key. position: of the first token when it was encoded.
    dtype: of the state, without `torch.`; `storage` is how the file keeps it.
    model, model_name, namespace, preamble_ids: what the key was made of; empty if unknown.
    text: the first characters of the text, empty if unknown. created: seconds since 1970.
    """

    digest: str
    token_ids: tuple[int, ...]
    position: int
    stacks: tuple[Stack, ...]
    dtype: str
    storage: str
    seal: str
    model: str
    model_name: str
    namespace: str
    preamble_ids: tuple[int, ...]
    text: str
    created: int

    @staticmethod
    def of(
        key: ModuleKey, state: KVState, storage: StorageDtype, seal: str, created: int
    ) -> Record:
        """Return the record of a state that is to be stored under a key."""
        space = key.space
        return Record(
            digest=key.digest,
            token_ids=key.token_ids,
            position=state.position,
            stacks=state.stacks,
            dtype=str(state.keys[0].dtype).removeprefix("torch."),
            storage=storage,
            seal=seal,
            model=space.model if space else "",
            model_name=space.model_name if space else "",
            namespace=space.namespace if space else "",
            preamble_ids=key.preamble_ids,
            text=_start_of_text(key),
            created=created,
        )

    def metadata(self) -> dict[str, str]:
        """As strings, the way safetensors keeps metadata."""
        return {
            "format": f"pcache-state-{FORMAT_VERSION}",
            "key": self.digest,
            "model": self.model,
            "model_name": self.model_name,
            "namespace": self.namespace,
            "dtype": self.dtype,
            "storage": self.storage,
            "seal": self.seal,
            "created": str(self.created),
            "position": str(self.position),
            "stacks": json.dumps([_stack_to_list(stack) for stack in self.stacks]),
            "text": self.text,
            "preamble_ids": json.dumps(self.preamble_ids),
            "token_ids": json.dumps(self.token_ids),
        }

    @staticmethod
    def parse(metadata: Mapping[str, str]) -> Record:
        """Return the inverse of `metadata`.

        Raises: StateMismatchError: another format or version. KeyError, TypeError, ValueError:
            not metadata of a state.
        """
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("metadata must be strings")
        if metadata["format"] != f"pcache-state-{FORMAT_VERSION}":
            raise StateMismatchError(
                f"format {metadata['format']!r:.40}, this version reads pcache-state-"
                f"{FORMAT_VERSION}"
            )
        if metadata["seal"] not in SEAL_BYTES:
            raise ValueError("unknown seal")
        return Record(
            digest=metadata["key"],
            token_ids=_integers(json.loads(metadata["token_ids"])),
            position=_natural(metadata["position"]),
            stacks=tuple(_stack_from_list(item) for item in json.loads(metadata["stacks"])),
            dtype=metadata["dtype"],
            storage=metadata["storage"],
            seal=metadata["seal"],
            model=metadata["model"],
            model_name=metadata["model_name"],
            namespace=metadata["namespace"],
            preamble_ids=_integers(json.loads(metadata["preamble_ids"])),
            text=metadata["text"],
            created=_natural(metadata["created"]),
        )

    def check_is_of(self, key: ModuleKey) -> None:
        """Raises: StateMismatchError: the record is of another key, or of other tokens."""
        space = key.space
        if space is not None and (self.model, self.namespace) != (space.model, space.namespace):
            raise StateMismatchError("the state is of another model or namespace")
        if self.digest != key.digest:
            raise StateMismatchError(f"the state is of key {self.digest[:16]!r}")
        if self.token_ids != key.token_ids:
            raise StateMismatchError("the state is of other tokens")


def _start_of_text(key: ModuleKey) -> str:
    if key.space is None or key.space.decode is None:
        return ""
    text = key.space.decode(key.token_ids[:_TEXT_TOKENS])[:_TEXT_CHARACTERS]
    return text.rstrip("\ufffd")  # the last token may end inside a character


def _stack_to_list(stack: Stack) -> list[object]:
    shape = stack.shape
    return [shape.key_heads, shape.key_dim, shape.value_heads, shape.value_dim, stack.layers]


def _stack_from_list(item: list[object]) -> Stack:
    *sizes, layers = item
    return Stack(LayerShape(*_integers(sizes)), _integers(layers))


def _natural(text: str) -> int:
    (number,) = _integers([int(text)])
    return number


def _integers(values: object) -> tuple[int, ...]:
    """Raises: ValueError: anything but a list of integers from 0 up."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        raise ValueError("not a list of integers")
    if values and min(values) < 0:
        raise ValueError("not a list of natural numbers")
    return tuple(values)
