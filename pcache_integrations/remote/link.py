"""What a server is: the model that it runs, and its prompt cache connector."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from pcache_core.errors import ModelError, PromptError
from pcache_core.library.preamble import Preamble
from pcache_core.lm import ServedModel
from pcache_integrations.remote.modules import ModuleMaker
from pcache_integrations.remote.server import Server
from pcache_integrations.vllm.protocol import (
    LOAD,
    Description,
    ProtocolError,
    preambles_digest,
)

logger = logging.getLogger(__name__)

_OTHER_PREAMBLES = (
    "the server's states are encoded after other preambles than this client's; give both the same "
    "one (`pcache serve --preamble FILE`, preamble=Preamble.of_file(FILE) here), and the same "
    "tokenizer and version of pcache-integrations"
)
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


@dataclass(frozen=True, slots=True)
class _Found:
    """What a server said of itself. reason: why its states are of no use here."""

    connector: Description | None
    maker: ModuleMaker
    reason: str | None


class Link:
    """A server's connector, which is asked for once. Thread-safe.

    namespace: whose states are wanted. preamble: what they have to be encoded after.
    """

    def __init__(self, server: Server, lm: ServedModel, namespace: str, preamble: Preamble) -> None:
        self._server = server
        self._lm = lm
        self._namespace = namespace
        self._preamble = preamble
        self._lock = threading.Lock()
        self._asked: _Found | None = None

    @property
    def connector(self) -> Description | None:
        """The server's connector; None if it has none, or one of another version."""
        return self._found().connector

    @property
    def maker(self) -> ModuleMaker:
        """Makes the modules that the server's connector knows."""
        return self._found().maker

    def usable(self) -> Description | str:
        """The connector, or why its states are of no use here."""
        found = self._found()
        return found.reason or found.connector or _NO_CONNECTOR

    def _found(self) -> _Found:
        with self._lock:
            if self._asked is None:
                self._asked = self._judge()
            return self._asked

    def _judge(self) -> _Found:
        connector, reason = None, None
        try:
            connector = self._ask()
        except ProtocolError as error:
            reason = str(error)
        length = self._lm.context_length if connector is None else connector.context_length
        maker = ModuleMaker(self._lm, self._preamble, length)
        if connector and connector.namespace != self._namespace:
            return _Found(
                connector,
                maker,
                f"the server's states are of namespace {connector.namespace!r}, this engine's is "
                f"{self._namespace!r}",
            )
        if connector and connector.preambles != preambles_digest(maker.by_name):
            reason = _OTHER_PREAMBLES
        if reason:
            logger.warning("no states are reused: %s", reason)
        return _Found(connector, maker, reason)

    def _ask(self) -> Description | None:
        """A prompt of one token, whose answer describes the connector.

        Raises: ProtocolError: the connector speaks another version.
        """
        lm = self._lm
        first = lm.text.bos_ids or tuple(lm.token_ids("a")[:1])
        body = {"model": lm.name, "prompt": list(first), "max_tokens": 1, "temperature": 0}
        try:
            answer = self._server.complete({**body, "kv_transfer_params": {LOAD: []}})
        except PromptError:  # it takes no such parameters
            return None
        return Description.parse(answer.get("kv_transfer_params"))
