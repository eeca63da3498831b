"""The catalog: items, their token paths and the prefix tree over them."""

from .catalog import ItemCatalog
from .items import Item
from .seen import SeenItems
from .tree import PrefixTree


__all__ = ["Item", "ItemCatalog", "PrefixTree", "SeenItems"]
