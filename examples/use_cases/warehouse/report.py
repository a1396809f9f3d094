"""Reports as text."""

from warehouse import Warehouse


def fill_report(warehouse: Warehouse) -> str:
    shares = (100 * shelf.weight_g // shelf.limit_g for shelf in warehouse.shelves)
    return "\n".join(f"shelf {n}: {share} %" for n, share in enumerate(shares))
