"""What a server is: the model that it runs, and its prompt cache connector."""

from __future__ import annotations

import threading

from pcache_core.errors import ModelError, PromptError
from pcache_core.lm import ServedModel
from pcache_integrations.remote.server import Server
from pcache_integrations.vllm.protocol import LOAD, Description

_NO_CONNECTOR = "the server has no prompt cache connector; start it with `pcache serve`"


def served_model(server: Server, name: str) -> ServedModel:
    """The server's model of this name, with its tokenizer.

    Raises: ModelError: the server has none of that name, or can't be reached; no tokenizer.
    """
    models = server.models()
    found = next((each for each in models if each.get("id") == name), None)
    if found is None:
        names = ", ".join(str(each.get("id")) for each in models) or "none"
        raise ModelError(
            f"{server.address.base_url} has no model {name!r}, but {names}; start it with "
            f"--served-model-name {name}, or name one of these"
        )
    length = found.get("max_model_len")
    return ServedModel.from_pretrained(name, length if isinstance(length, int) else None)


class Link:
    """A server's connector, which is asked for once. Thread-safe.

    namespace: whose states are wanted.
    """

    def __init__(self, server: Server, lm: ServedModel, namespace: str) -> None:
        self._server = server
        self._lm = lm
        self._namespace = namespace
        self._lock = threading.Lock()
        self._asked: tuple[Description | None] | None = None

    @property
    def connector(self) -> Description | None:
        """The server's connector; None if it has none."""
        with self._lock:
            if self._asked is None:
                self._asked = (self._ask(),)
            return self._asked[0]

    def usable(self) -> Description | str:
        """The connector, or why there is none for this namespace."""
        connector = self.connector
        if connector is None:
            return _NO_CONNECTOR
        if connector.namespace != self._namespace:
            return (
                f"the server's states are of namespace {connector.namespace!r}, this engine's is "
                f"{self._namespace!r}"
            )
        return connector

    def _ask(self) -> Description | None:
        """A prompt of one token, whose answer describes the connector."""
        lm = self._lm
        first = lm.text.bos_ids or tuple(lm.token_ids("a")[:1])
        body = {"model": lm.name, "prompt": list(first), "max_tokens": 1, "temperature": 0}
        try:
            answer = self._server.complete({**body, "kv_transfer_params": {LOAD: []}})
        except PromptError:  # it takes no such parameters
            return None
        return Description.parse(answer.get("kv_transfer_params"))
