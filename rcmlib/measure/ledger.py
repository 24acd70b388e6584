"""The byte ledger: what each pass of an implementation reads and writes, tensor by tensor.

    passes = pipeline("flash_eager", 4, 12, 2048, 64)
    total(passes)             # bytes, caches ignored: every tensor a pass touches crosses HBM
    hbm(passes, 50 * 2**20)   # bytes, when an L2 cache of 50 MiB keeps what it can

Left out: what has one number a row or fewer (scales, means, log-sum-exps, coefficients), and
padding. Repeated reads of k and v within a kernel find them in L2 (chapters 2 and 13).
"""

from collections.abc import Callable
from typing import NamedTuple

from rcmlib.measure.implementations import ATTENTION, EAGER, FUSED, IMPLEMENTATIONS, SKIP


class Pass(NamedTuple):
    """One kernel (or one logical step): bytes read and written, by tensor name."""

    name: str
    reads: dict[str, int]
    writes: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())

    @property
    def touched(self) -> dict[str, int]:
        """Every tensor once, with its bytes."""
        return self.reads | self.writes


class Traffic(NamedTuple):
    """Bytes that cross HBM."""

    read: float
    written: float

    @property
    def bytes(self) -> float:
        return self.read + self.written


def total(passes: list[Pass]) -> int:
    """Bytes that a pipeline moves, caches ignored."""
    return sum(p.bytes for p in passes)


def tensors(passes: list[Pass]) -> int:
    """How many tensors a pipeline moves: each read and each write counts one."""
    return sum(len(p.reads) + len(p.writes) for p in passes)


def hbm(passes: list[Pass], l2_bytes: float = 0) -> Traffic:
    """What crosses HBM when the last `l2_bytes` bytes touched are still in the L2 cache.

    A pass streams through its tensors side by side, from front to back. The cache forgets what
    was touched longest ago, and is empty at first. What is written reaches HBM once. So 0 gives
    `total`, and an infinite l2_bytes reads each input once, and never what was written here.
    """
    read, last = 0.0, {}
    for i, step in enumerate(passes):
        for name, size in step.reads.items():
            found = _found(passes[last[name] : i + 1], l2_bytes) if name in last else 0
            read += size * (1 - found)
        last |= dict.fromkeys(step.touched, i)
    return Traffic(read, sum(sum(p.writes.values()) for p in passes))


def _found(passes: list[Pass], l2_bytes: float) -> float:
    """The share of a tensor that the last pass finds in L2, touched before in the first.

    The part at depth t (0: front, 1: end) comes back after the rest of the first pass, all of
    those between and the part t of the last one. In between as many different bytes were
    touched as `front` says for t = 0 and `end` for t = 1, and proportionally for the others.
    """
    first, *between, last = (p.touched for p in passes)
    middle = {name: size for touched in between for name, size in touched.items()}
    front, end = (sum((middle | touched).values()) for touched in (first, last))
    low, high = sorted((front, end))
    if l2_bytes >= high:
        return 1.0
    return max(0.0, (l2_bytes - low) / (high - low)) if high > low else 0.0


PIPELINES = {"negate": (("negate", "x", "out"),)} | {
    label: row.passes for label, row in IMPLEMENTATIONS.items() if row.passes
}


def pipeline(
    label: str, batch: int, heads: int, tokens: int, dim: int, itemsize: int = 2
) -> list[Pass]:
    """The passes of one implementation. KeyError for a label that has no ledger.

    itemsize: bytes of a number in q, k, v, x and out. Also "negate", which reads x and writes
    -x: its bytes are known, so it checks the instrument.
    """
    numbers = batch * heads * tokens * dim
    other = dict.fromkeys(("q8", "k8", "v8"), numbers)
    other |= dict.fromkeys(("S", "scaled", "P"), batch * heads * tokens * tokens * itemsize)
    return _passes(numbers * itemsize, *PIPELINES[label], other=other)


# ---- the layer's counts, in tensors of one size: batch × tokens × channels × itemsize ----


def _layer(name: str, *rows: tuple[str, str, str]) -> Callable[..., list[Pass]]:
    def layer(batch: int, tokens: int, channels: int, itemsize: int = 2) -> list[Pass]:
        return _passes(batch * tokens * channels * itemsize, *rows)

    layer.__name__ = name
    return layer


two_pass_eager = _layer("two_pass_eager", ATTENTION, *EAGER)  # two products and a sum
two_pass_compiled = _layer("two_pass_compiled", ATTENTION, SKIP)  # the skip as one kernel
fused = _layer("fused", FUSED)  # one kernel: F never leaves the chip

# The published 11 → 8 count: with the QKV projection, and x free in the fused pass. It is 9,
# where x is read again.
PROJECTION = ("QKV projection", "x", "q k v")
published_two_pass = _layer("published_two_pass", PROJECTION, ATTENTION, SKIP)
published_fused = _layer("published_fused", PROJECTION, ("attention + skip", "q k v", "out"))
honest_fused = _layer("honest_fused", PROJECTION, FUSED)


def _passes(
    size: int, *rows: tuple[str, str, str], other: dict[str, int] | None = None
) -> list[Pass]:
    """Every tensor has `size` bytes, but for those named in `other`."""

    def sized(names: str) -> dict[str, int]:
        return {name: (other or {}).get(name, size) for name in names.split()}

    return [Pass(name, sized(reads), sized(writes)) for name, reads, writes in rows]
