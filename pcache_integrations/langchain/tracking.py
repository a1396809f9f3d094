"""Vector stores that are searched without a retriever, so that no callback tells of it."""

from __future__ import annotations

import inspect
from abc import update_abstractmethods
from functools import wraps
from typing import Any

from langchain_core.vectorstores import VectorStore

from pcache_core.errors import OptionError
from pcache_integrations.langchain.watch import WATCHER


class TrackedVectorStore(VectorStore):
    """A vector store that is asked in another's place. All of it is the other's."""

    def __init__(self, store: VectorStore) -> None:
        object.__setattr__(self, "_store", store)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._store, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_store":  # a copy that isn't made yet has no store
            raise AttributeError(name)
        return _noting(getattr(self._store, name))


def _noting(value: Any) -> Any:
    """Have what a method returns looked through for documents; what is no method stays as it is."""
    if not inspect.isroutine(value):
        return value
    if inspect.iscoroutinefunction(value):

        @wraps(value)
        async def acall(*args: Any, **kwargs: Any) -> Any:
            found = await value(*args, **kwargs)
            WATCHER.add_documents(found)
            return found

        return acall

    @wraps(value)
    def call(*args: Any, **kwargs: Any) -> Any:
        found = value(*args, **kwargs)
        WATCHER.add_documents(found)
        return found

    return call


def _forwarded(name: str) -> property:
    return property(lambda self: self.__getattr__(name))


# What VectorStore itself has is never missing, so that nothing would ask the other for it.
for _name in dir(VectorStore):
    if not _name.startswith(("__", "_abc_")):
        setattr(TrackedVectorStore, _name, _forwarded(_name))
update_abstractmethods(TrackedVectorStore)  # type: ignore[type-abstract]


def track(vector_store: VectorStore) -> TrackedVectorStore:
    """Have prompts recognise the documents that a vector store finds.

    ```python
    vector_store = track(InMemoryVectorStore(embeddings))
    ```

    Returns: a vector store in place of the one given, which stays as it was. Whatever is asked of
        it, sync or async, the other is asked.
    Raises: OptionError: something else than a vector store was given.
    """
    if isinstance(vector_store, TrackedVectorStore):
        return vector_store
    if not isinstance(vector_store, VectorStore):
        raise OptionError(
            f"track takes a vector store, got {vector_store!r:.80}; retrievers are recognised "
            "without it, and what else finds documents can give them to cache_documents"
        )
    return TrackedVectorStore(vector_store)  # type: ignore[abstract]
