"""What a benchmark is asked to measure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pcache_core import DiskStore, MemoryStore, ModuleStore, OptionError
from pcache_core.params import ReuseMode, check_reuse
from pcache_integrations.bench.figures import Order
from pcache_integrations.bench.gguf_file import GgufType

_FIXED_TOKENS = 64  # the opening and what stands around the question, generously
_FEWEST_DOCUMENT_TOKENS = 16  # shorter ones may be computed in line
_REDIS_TTL_S = 3600
# As many as an engine keeps of finished requests, and the one that runs.
_SLOTS_PER_ENGINE = 5
_PEER_PROMPTS = 4  # that a peer has room for


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Checked when made.

    sizes: tokens of all documents of a prompt together. modes: without `off`, which is always
    measured. orders: `same`, `new` or both. tier: `memory`, `disk`, or a server's address. batch:
    requests at once; 0 measures none. store_states: other states in a second store; 0 for none.

    Raises: OptionError.
    """

    sizes: tuple[int, ...]
    documents: int
    question_tokens: int
    answer_tokens: int
    modes: tuple[ReuseMode, ...]
    orders: tuple[Order, ...]
    tier: str
    batch: int
    rounds: int
    seed: int
    store_states: int
    gguf_type: GgufType
    gguf_file: Path | None

    def __post_init__(self) -> None:
        smallest = min(self.sizes)
        if smallest < _FEWEST_DOCUMENT_TOKENS * self.documents:
            raise OptionError(
                f"--cached {smallest} makes {self.documents} documents of "
                f"{smallest // self.documents} tokens, the least is {_FEWEST_DOCUMENT_TOKENS}; "
                "take more tokens or fewer --documents"
            )
        if not (self.tier in ("memory", "disk") or "://" in self.tier):
            raise OptionError(
                f"unknown --tier {self.tier!r}; use memory, disk or redis://host:port"
            )
        if self.gguf_file is not None and not self.gguf_file.is_file():
            raise OptionError(f"--gguf {str(self.gguf_file)!r} is no file")

    @property
    def context_tokens(self) -> int:
        """The longest prompt and its answer."""
        return max(self.sizes) + self.question_tokens + self.answer_tokens + _FIXED_TOKENS

    @property
    def peer_kv_tokens(self) -> int:
        """Tokens whose keys and values a peer should have room for."""
        return _PEER_PROMPTS * self.context_tokens

    def needed_nbytes(self, *, weights: int, kv_per_token: int, peers: int) -> dict[str, int]:
        """Bytes by what they are for. weights, kv_per_token: bytes. peers: that hold the model."""
        stores = (3 if self.tier == "memory" else 0) + bool(self.store_states)
        engines = 1 + len(self.modes) + bool(self.store_states)
        buffers = _SLOTS_PER_ENGINE * engines + self.batch + 1
        return {
            "weights": weights,
            "peers": peers * (weights + self.peer_kv_tokens * kv_per_token),
            "states": (stores * max(self.sizes) + self.store_states) * kv_per_token,
            "buffers": buffers * self.context_tokens * kv_per_token,
        }

    def as_json(self) -> Mapping[str, Any]:
        """For the report, without a server's password."""
        tier = self.tier
        if "://" in tier:
            from pcache_core.store.redis import without_password

            tier = without_password(tier)
        return {**asdict(self), "tier": tier, "gguf_file": self.gguf_file and self.gguf_file.name}

    @contextmanager
    def store(self, budget_bytes: int) -> Iterator[ModuleStore]:
        """An empty store of the tier; what a server was given expires by itself."""
        if self.tier == "memory":
            yield MemoryStore(budget_bytes=budget_bytes)
        elif self.tier == "disk":
            with TemporaryDirectory(prefix="pcache-bench-") as folder:
                yield DiskStore(folder)
        else:
            from pcache_core.store.redis import RedisStore

            yield RedisStore(self.tier, ttl_s=_REDIS_TTL_S)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Token counts by commas, `k` for 1024; ascending, each once. Raises: OptionError."""
    found = set()
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)(k?)", part.strip().lower())
        if match is None:
            raise OptionError(f"--cached {text!r} is no list of token counts; use such as 1k,5000")
        found.add(int(match[1]) * (1024 if match[2] else 1))
    return tuple(sorted(found))


def parse_modes(text: str) -> tuple[ReuseMode, ...]:
    """Reuse modes by commas, without `off`. Raises: OptionError."""
    modes = (check_reuse(part.strip()) for part in text.split(","))
    return tuple(dict.fromkeys(mode for mode in modes if mode != "off"))


def parse_orders(text: str) -> tuple[Order, ...]:
    """`same`, `new` or both, by commas. Raises: OptionError."""
    parts = [part.strip() for part in text.split(",")]
    unknown = [part for part in parts if part not in ("same", "new")]
    if unknown:
        raise OptionError(f"unknown --order {unknown[0]!r}; use same, new or same,new")
    orders: tuple[Order, ...] = ("same", "new")
    return tuple(order for order in orders if order in parts)
