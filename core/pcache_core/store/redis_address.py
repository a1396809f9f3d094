"""From the address of a Redis or Valkey server to a client."""

from __future__ import annotations

from pcache_core.errors import DependencyError, OptionError

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise DependencyError(
        "RedisStore needs the redis package; pip install 'pcache-integrations[redis]'"
    ) from error

__all__ = ["checked_ttl", "client_of", "redis", "without_password"]

_SCHEMES = {"redis": "redis", "rediss": "rediss", "unix": "unix", "valkey": "redis"}


def client_of(url: object, timeout_s: object) -> redis.Redis:
    """A client that connects when it is first used, and once more when a connection has died."""
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or timeout_s <= 0:
        raise OptionError(f"timeout_s={timeout_s!r} must be a number of seconds above 0")
    scheme, separator, rest = str(url).partition("://")
    if not separator or scheme not in _SCHEMES:
        raise OptionError(
            f"{without_password(str(url))!r} is no address of a server; "
            "use redis://host:port/database, rediss://, valkey:// or unix://path"
        )
    try:
        return redis.Redis.from_url(
            f"{_SCHEMES[scheme]}://{rest}",
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
    except (ValueError, TypeError) as error:
        raise OptionError(f"{without_password(str(url))!r} is no address: {error}") from None


def checked_ttl(ttl_s: object) -> int | None:
    """Return it. Raises: OptionError: not a whole number of seconds above 0."""
    whole = isinstance(ttl_s, int) and not isinstance(ttl_s, bool) and ttl_s > 0
    if ttl_s is None or whole:
        return ttl_s  # type: ignore[return-value]
    raise OptionError(f"ttl_s={ttl_s!r} must be a whole number of seconds above 0, or None")


def without_password(url: str) -> str:
    """The address as it may be logged."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
