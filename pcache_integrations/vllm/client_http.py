"""The server's completions, over HTTP."""

from __future__ import annotations

import json
import math
import ssl
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import httpx

from pcache_core.errors import ModelError, OptionError, PromptError
from pcache_core.scheduler import too_late

_CONNECT_S = 10.0
_DEFAULT_TIMEOUT_S = 600.0
_DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and how it is asked.

    base_url: with or without `/v1`. timeout_s: of each piece of an answer, the first included.
    max_retries: of connections that fail.

    Raises: OptionError: no address; a time or a number out of range.
    """

    base_url: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = _DEFAULT_TIMEOUT_S
    max_retries: int = 2

    def __post_init__(self) -> None:
        url = self.base_url.rstrip("/").removesuffix("/v1")
        if not url.startswith(("http://", "https://")):
            raise OptionError(
                f"base_url={self.base_url!r} must be a server's, such as 'http://localhost:8000'"
            )
        object.__setattr__(self, "base_url", url)
        if self.timeout_s <= 0 or self.max_retries < 0:
            raise OptionError(
                f"timeout={self.timeout_s!r}, max_retries={self.max_retries!r}: a time above 0 "
                "and a number from 0 up"
            )


class Server:
    """An OpenAI-compatible server; its calls may come from several threads and event loops.

    Raises, in every call: ModelError: it can't be reached, or fails. PromptError: it refuses what
        it was asked.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._client = httpx.Client(
            transport=httpx.HTTPTransport(retries=address.max_retries, verify=self._verify),
            **self._options,
        )
        weakref.finalize(self, self._client.close)

    def models(self) -> list[dict[str, Any]]:
        """List what the server has: `id`, and with vLLM `max_model_len`."""
        data = self._checked(self._send("GET", "/v1/models", None)).get("data")
        return list(data) if isinstance(data, list) else []

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return one completion, whole."""
        return self._checked(self._send("POST", "/v1/completions", body))

    def stream(
        self, body: Mapping[str, Any], timeout_s: float | None = None
    ) -> Generator[dict[str, Any], None, None]:
        """Yield the events of a completion; closing the generator ends it on the server.

        timeout_s: for all of them. Raises: DeadlineExceededError: it has passed.
        """
        check = _deadline(timeout_s)
        timeout = self._timeout(timeout_s)
        try:
            with self._client.stream(
                "POST", "/v1/completions", json=body, timeout=timeout
            ) as response:
                if response.is_error:
                    response.read()
                    self._checked(response)
                for line in response.iter_lines():
                    check()
                    event = self._event(line)
                    if event is not None:
                        yield event
        except httpx.HTTPError as error:
            check()
            raise self._unreachable(error) from error

    async def astream(
        self, body: Mapping[str, Any], timeout_s: float | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield them in an event loop, over a connection of its own: loops can't share one."""
        check = _deadline(timeout_s)
        timeout = self._timeout(timeout_s)
        transport = httpx.AsyncHTTPTransport(retries=self.address.max_retries, verify=self._verify)
        try:
            async with (
                httpx.AsyncClient(transport=transport, **self._options) as client,
                client.stream("POST", "/v1/completions", json=body, timeout=timeout) as response,
            ):
                if response.is_error:
                    await response.aread()
                    self._checked(response)
                async for line in response.aiter_lines():
                    check()
                    event = self._event(line)
                    if event is not None:
                        yield event
        except httpx.HTTPError as error:
            check()
            raise self._unreachable(error) from error

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        try:
            return self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    @property
    def _options(self) -> dict[str, Any]:
        key = self.address.api_key
        return {
            "base_url": self.address.base_url,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": self._timeout(None),
        }

    def _timeout(self, timeout_s: float | None) -> httpx.Timeout:
        each = self.address.timeout_s
        each = each if timeout_s is None else min(each, timeout_s)
        return httpx.Timeout(each, connect=min(each, _CONNECT_S))

    @cached_property
    def _verify(self) -> ssl.SSLContext | bool:
        """Certificates, read once; False for plain HTTP, as reading them takes a while."""
        if not self.address.base_url.startswith("https://"):
            return False
        return httpx.create_ssl_context()

    def _event(self, line: str) -> dict[str, Any] | None:
        """Read a line of an event stream; None for those that say nothing."""
        name, _, data = line.partition(":")
        if name != "data" or data.strip() == _DONE:
            return None
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise ModelError(
                f"{self.address.base_url} sent {data.strip()[:200]!r} in mid-answer, which is no "
                "event of a completion (a JSON object); see the server's log, and ask again"
            )
        if "error" in event:
            raise ModelError(f"{self.address.base_url} failed in mid-answer: {_message(event)}")
        return event

    def _checked(self, response: httpx.Response) -> dict[str, Any]:
        try:
            content = response.json()
        except ValueError:
            content = {}
        if not isinstance(content, dict):
            content = {}
        if response.is_success:
            return content
        place = f"{self.address.base_url} answers {response.status_code}"
        reason = _message(content) or response.text[:200]
        if response.status_code in (400, 422):
            raise PromptError(f"{place}: {reason}")
        raise ModelError(f"{place}: {reason}")

    def _unreachable(self, error: Exception) -> ModelError:
        return ModelError(
            f"{self.address.base_url} gives no answer ({type(error).__name__}: {error}); start "
            "the server, for example with `pcache serve --run`, or correct base_url"
        )


def _deadline(timeout_s: float | None) -> Callable[[], None]:
    """Return what raises DeadlineExceededError when an answer should be there."""
    ends = math.inf if timeout_s is None else time.monotonic() + timeout_s

    def check() -> None:
        if time.monotonic() >= ends:
            raise too_late(timeout_s)

    return check


def _message(content: Mapping[str, Any]) -> str:
    error = content.get("error", content)
    return str(error.get("message", "") if isinstance(error, Mapping) else error)
