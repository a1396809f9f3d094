"""Has a server encode what it lacks: short requests whose keys and values it keeps as states."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from tqdm import tqdm

from pcache_core.errors import PromptCacheError
from pcache_core.report import EncodeReport
from pcache_integrations.vllm.client_http import Server
from pcache_integrations.vllm.client_modules import Module
from pcache_integrations.vllm.protocol import SAVE, Description, Run, exact_salt

logger = logging.getLogger(__name__)

_AT_ONCE = 8
_MOST_KNOWN = 100_000
# A store may drop what was kept; what is still missing then is asked for again.
_ASK_AGAIN_S = 600.0


class Keeper:
    """Asks a server for states, for each once in ten minutes at most. Thread-safe.

    tokens, elapsed_ms: what the server was asked to encode, and how long that took.
    """

    def __init__(self, server: Server, model: str) -> None:
        self.tokens = 0
        self.elapsed_ms = 0.0
        self._server = server
        self._model = model
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="pcache-keep")
        self._lock = threading.Lock()
        self._known: OrderedDict[str, float] = OrderedDict()
        self._waiting: set[Future[None]] = set()

    def learn(self, connector: Description, modules: Sequence[Module], cached: int) -> None:
        """Have encoded, in the background, what lay after the first `cached` tokens."""
        if not connector.saves:
            return
        for module in modules:
            if module.used <= cached:
                continue
            key = module.key(connector.key_space)
            if self._is_new(key):
                job = self._threads.submit(self._keep_quietly, connector, module, key)
                with self._lock:
                    self._waiting.add(job)
                job.add_done_callback(self._done)

    def encode(
        self,
        connector: Description,
        modules: Sequence[Sequence[Module]],
        texts: int,
        *,
        progress: bool,
    ) -> EncodeReport:
        """Have encoded what this process has not just asked for; return when all is kept.

        modules: of each text that has any.
        Raises: ModelError: the server can't be reached.
        """
        started = time.perf_counter()
        space = connector.key_space
        keyed = [{module.key(space): module for module in own} for own in modules]
        every = {key: module for own in keyed for key, module in own.items()}
        new = {key: module for key, module in every.items() if self._is_new(key)}
        jobs = [self._threads.submit(self._keep, connector, new[key], key) for key in new]
        disable = None if progress else True  # None: only on a terminal
        with tqdm(total=len(jobs), desc="encoding", unit="state", disable=disable) as bar:
            for job in jobs:
                job.result()
                bar.update()
        encoded = sum(not new.keys().isdisjoint(own) for own in keyed)
        return EncodeReport(
            texts=texts,
            encoded=encoded,
            kept=encoded,
            already_stored=len(keyed) - encoded,
            too_short=texts - len(keyed),
            tokens=sum(len(module.token_ids) for module in new.values()),
            seconds=time.perf_counter() - started,
        )

    def flush(self) -> None:
        """Wait for what runs in the background."""
        with self._lock:
            jobs = list(self._waiting)
        wait(jobs)

    def _is_new(self, key: str) -> bool:
        now = time.monotonic()
        with self._lock:
            is_new = now - self._known.get(key, -math.inf) > _ASK_AGAIN_S
            if is_new:
                self._known[key] = now
            self._known.move_to_end(key)
            if len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
            return is_new

    def _keep(self, connector: Description, module: Module, key: str) -> None:
        started = time.perf_counter()
        ids = (*module.preamble_ids, *module.token_ids)
        run = Run(len(module.preamble_ids), len(ids), key, module.preamble)
        try:
            self._server.complete(
                {
                    "model": self._model,
                    "prompt": list(ids),
                    "max_tokens": 1,
                    "temperature": 0,
                    "cache_salt": exact_salt(connector.namespace),
                    "kv_transfer_params": {SAVE: run.as_list()},
                }
            )
        except PromptCacheError:
            with self._lock:
                self._known.pop(key, None)
            raise
        with self._lock:
            self.tokens += len(module.token_ids)
            self.elapsed_ms += (time.perf_counter() - started) * 1000

    def _keep_quietly(self, connector: Description, module: Module, key: str) -> None:
        try:
            self._keep(connector, module, key)
        except PromptCacheError as error:
            logger.warning("a document was not encoded for later: %s", error)

    def _done(self, job: Future[None]) -> None:
        with self._lock:
            self._waiting.discard(job)
