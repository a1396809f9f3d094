"""What a customer wants."""

from dataclasses import dataclass

from item import Item


@dataclass
class Order:
    customer: str
    wanted: dict[Item, int]

    def price_cents(self) -> int:
        return sum(item.price_cents * count for item, count in self.wanted.items())
