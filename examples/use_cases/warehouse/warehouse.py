"""Shelves, and orders that are packed from them."""

from item import Item
from order import Order
from shelf import Shelf


class Warehouse:
    def __init__(self, shelves: list[Shelf]) -> None:
        self.shelves = shelves

    def stock(self, item: Item) -> int:
        return sum(shelf.pieces.get(item, 0) for shelf in self.shelves)

    def pack(self, order: Order) -> bool:
        if any(self.stock(item) < count for item, count in order.wanted.items()):
            return False
        for item, count in order.wanted.items():
            for shelf in self.shelves:
                count -= shelf.take(item, count)
        return True
