"""What the command line says when something goes wrong, and its exit statuses."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Sequence

from pcache_core.errors import ModelError, PromptCacheError

NOT_ALL_DONE = 1
USER_ERROR = 2
INTERRUPTED = 130

EXIT_STATUSES = (
    "Exit status: 0 done; 1 not all of it was done, or you said no; 2 something given or found is "
    "wrong, and the message says what; 130 interrupted."
)

_NO_HUB = (
    "The hub can't be reached from here, and its cache has no copy of the model. Connect to the "
    "network; or save the model where there is one (hf download) and give its folder or GGUF file; "
    "builtin:tiny-rag needs neither."
)
_UNKNOWN = (
    "The hub knows no such model, or it is private. Compare the name with its page; for a private "
    "one, log in with: hf auth login"
)
_GATED = (
    "The model's owner wants to be asked first. Accept the conditions on its page, then log in "
    "with: hf auth login"
)
_NO_MEMORY = (
    "there is not enough memory for this. Take a smaller model, --dtype bfloat16, or a machine or "
    "device that has more."
)


def explain(error: BaseException) -> str | None:
    """Say it to the user; None for an error that nobody foresaw, which is a bug of ours."""
    chain = tuple(_chain(error))
    if any(map(_is_out_of_memory, chain)):
        return _NO_MEMORY
    if isinstance(error, ModelError):
        return "\n".join([str(error), *_hub_hints(chain)])
    if isinstance(error, PromptCacheError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _hub_hints(chain: Sequence[BaseException]) -> list[str]:
    """Say what to do about the hub's refusal, in one sentence at most."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    hints = (
        (GatedRepoError, _GATED),  # before its base class, the next one
        (RepositoryNotFoundError, _UNKNOWN),
        ((ConnectionError, TimeoutError, socket.gaierror), _NO_HUB),
    )
    return [text for kinds, text in hints if any(isinstance(each, kinds) for each in chain)][:1]


def _is_out_of_memory(error: BaseException) -> bool:
    from torch import OutOfMemoryError

    refused = re.search(r"(can't|cannot) allocate memory", str(error), flags=re.IGNORECASE)
    return refused is not None or isinstance(error, (MemoryError, OutOfMemoryError))
