"""Warnings that are counted, and not repeated for every request."""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger(__name__)


class Tally:
    """What was not done as asked, by reason; logged at a reason's 1st, 10th, 100th … time."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, reason: str, detail: str) -> None:
        """Count it. reason: the same for all of a kind. detail: of this one, for the log."""
        self.counts[reason] += 1
        count = self.counts[reason]
        if str(count).strip("0") == "1":
            logger.warning(
                "prompt cache: %s (%s); computed as usual, %d so far", reason, detail, count
            )
