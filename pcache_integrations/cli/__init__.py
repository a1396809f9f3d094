"""The command line: `pcache`."""

from pcache_integrations.cli.commands import app, main

__all__ = ["app", "main"]
