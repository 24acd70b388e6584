"""The book's figures: one function a figure, one module a chapter; each returns a Figure."""

from rcmlib.figures.baseline import (
    ledger_boxes,
    noise_levels,
    photo_to_tokens,
    skip_share,
)
from rcmlib.figures.skip import copy_ceiling, programs_1d, programs_3d
from rcmlib.figures.style import PALETTE, new_figure
from rcmlib.figures.tiles import (
    attention_rates,
    rescaling,
    score_memory,
    tiles_in_flight,
)

__all__ = [
    "PALETTE",
    "attention_rates",
    "copy_ceiling",
    "ledger_boxes",
    "new_figure",
    "noise_levels",
    "photo_to_tokens",
    "programs_1d",
    "programs_3d",
    "rescaling",
    "score_memory",
    "skip_share",
    "tiles_in_flight",
]
