"""Vector stores that are searched without a retriever, so that no callback tells of it."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from langchain_core.retrievers import BaseRetriever

from pcache_core.errors import OptionError
from pcache_integrations.langchain._provenance import PROVENANCE, harmless

StoreT = TypeVar("StoreT")

# Classes made here, by the class that they track.
_made: WeakValueDictionary[type, type] = WeakValueDictionary()


def track(vector_store: StoreT) -> StoreT:
    """Have prompts recognise the documents that a vector store finds; returns the same store.

    Its methods with `search` in their names, sync and async, are watched, those of this object
    alone. Copies and unpickled stores are not tracked.

    ```python
    vector_store = track(InMemoryVectorStore(embeddings))
    ```

    Raises: OptionError: nothing that can be searched.
    """
    kind = type(vector_store)
    if kind in _made.values():
        return vector_store
    names = [name for name in dir(kind) if _is_search(kind, name)]
    if isinstance(vector_store, (type, BaseRetriever)) or not names:
        raise OptionError(
            f"track takes a vector store, got {vector_store!r:.80}; it needs a method such as "
            "similarity_search, and retrievers are recognised without it"
        )
    tracking = _made.get(kind) or _made.setdefault(kind, _tracking_class(kind, names))
    try:
        # Not by wrapping methods in the object: its copies would search the original then.
        object.__setattr__(vector_store, "__class__", tracking)
    except TypeError as error:
        raise OptionError(
            f"a {kind.__name__} can't be tracked: {error}; give what it finds to cache_documents"
        ) from error
    return vector_store


def _as_it_was(store: Any, protocol: Any) -> Any:
    """How to copy or pickle a tracked store: as one of the class that it was of."""
    mine: Any = type(store)
    made: Any = super(mine, store).__reduce_ex__(protocol)
    if isinstance(made, str):
        return made
    original: Any = mine.__base__
    function, arguments, *rest = (original if part is mine else part for part in made)
    # Pickle insists on the object's own class with this function, but not with one just like it.
    function = _new if function is copyreg.__newobj__ else function  # type: ignore[attr-defined]
    return (function, tuple(original if part is mine else part for part in arguments), *rest)


def _new(kind: Any, *arguments: Any) -> Any:
    return kind.__new__(kind, *arguments)


def _is_search(kind: type, name: str) -> bool:
    is_method = inspect.isfunction(inspect.getattr_static(kind, name))
    return is_method and "search" in name and not name.startswith("_")


def _tracking_class(kind: type, names: list[str]) -> type:
    methods = {name: _noting(getattr(kind, name)) for name in names}
    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, **methods}
    return type(kind)(kind.__name__, (kind,), {**body, "__reduce_ex__": _as_it_was})


def _noting(method: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(method):

        @wraps(method)
        async def asearch(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _noted(await method(self, *args, **kwargs))

        return asearch

    @wraps(method)
    def search(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _noted(method(self, *args, **kwargs))

    return search


def _noted(found: Any) -> Any:
    with harmless("remembering what a search found"):
        PROVENANCE.add_documents(found)
    return found
