"""The Explorer: an interactive map of one model's readings."""

from superscopes_tl.explorer.explorer import Explorer
from superscopes_tl.explorer.server import explorer_cell, serve

__all__ = ["Explorer", "explorer_cell", "serve"]
