"""The book's figures: one function a figure, one module a chapter; each returns a Figure."""

from rcmlib.figures.style import PALETTE, new_figure

__all__ = ["PALETTE", "new_figure"]
