"""Things that a warehouse holds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    name: str
    weight_g: int
    price_cents: int
