"""How a report is drawn, for notebooks and terminals. Knows nothing of how prompts are read."""

from pcache_core.picture.model import Picture, Run, Time, shown
from pcache_core.picture.palette import Source

__all__ = ["Picture", "Run", "Source", "Time", "shown"]
