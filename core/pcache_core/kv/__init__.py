"""Keys and values: states, what names them, and the sequence of a request."""

from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import KVState

__all__ = ["KVState", "ModuleKey"]
