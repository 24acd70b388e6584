"""The suites of `python -m benchmarks suites`, by the name of the record they write."""

from benchmarks.suites import blocks, ceilings, layers, peers, sage, spine, training

SUITES = (
    ceilings.SUITES
    | spine.SUITES
    | training.SUITES
    | blocks.SUITES
    | sage.SUITES
    | peers.SUITES
    | layers.SUITES
)
