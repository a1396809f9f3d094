"""A shelf holds pieces of items, up to a weight."""

from item import Item


class Shelf:
    def __init__(self, limit_g: int) -> None:
        self.limit_g = limit_g
        self.pieces: dict[Item, int] = {}

    @property
    def weight_g(self) -> int:
        return sum(item.weight_g * count for item, count in self.pieces.items())

    def put(self, item: Item) -> bool:
        if self.weight_g + item.weight_g > self.limit_g:
            return False
        self.pieces[item] = self.pieces.get(item, 0) + 1
        return True

    def take(self, item: Item, count: int) -> int:
        taken = min(count, self.pieces.get(item, 0))
        self.pieces[item] = self.pieces.get(item, 0) - taken
        return taken
