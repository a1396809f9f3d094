"""Prompts answered by a vLLM server instead of a model in this process."""

from pcache_integrations.remote.engine import RemoteEngine
from pcache_integrations.remote.server import Address

__all__ = ["Address", "RemoteEngine"]
