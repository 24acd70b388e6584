"""The suites of `python -m benchmarks suites`, by the name of the record they write."""

from benchmarks.suites import (
    blocks,
    ceilings,
    ladder,
    layers,
    peers,
    sage,
    spine,
    timeline,
    training,
)

SUITES = (
    ceilings.SUITES
    | spine.SUITES
    | ladder.SUITES
    | timeline.SUITES
    | training.SUITES
    | blocks.SUITES
    | sage.SUITES
    | peers.SUITES
    | layers.SUITES
)
