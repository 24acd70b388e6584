"""The byte ledger: what each pass of a pipeline reads and writes, tensor by tensor.

A model, with caches ignored: every tensor that a kernel touches crosses HBM once. Chapter 2
derives the counts, and compares them with what the hardware does. All tensors of the attention
layer have the same size, batch × tokens × channels × itemsize bytes.
"""

from typing import NamedTuple


class Pass(NamedTuple):
    """One kernel (or one logical step): bytes read and written, by tensor name."""

    name: str
    reads: dict[str, int]
    writes: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


def total(passes: list[Pass]) -> int:
    """Bytes that a pipeline moves."""
    return sum(p.bytes for p in passes)


def tensors(passes: list[Pass]) -> int:
    """How many tensors a pipeline moves: each read and each write counts one."""
    return sum(len(p.reads) + len(p.writes) for p in passes)


def two_pass_eager(
    batch: int, tokens: int, channels: int, itemsize: int = 2
) -> list[Pass]:
    """Attention, then c_skip·x + c_out·F as PyTorch runs it: two products and a sum."""
    return _passes(
        batch * tokens * channels * itemsize,
        ("attention", "q k v", "F"),
        ("c_skip·x", "x", "a"),
        ("c_out·F", "F", "b"),
        ("a + b", "a b", "out"),
    )


def two_pass_compiled(
    batch: int, tokens: int, channels: int, itemsize: int = 2
) -> list[Pass]:
    """Attention, then the skip as one kernel (torch.compile's, or `rcmlib.rcm_skip`)."""
    return _passes(
        batch * tokens * channels * itemsize,
        ("attention", "q k v", "F"),
        ("skip", "x F", "out"),
    )


def fused(batch: int, tokens: int, channels: int, itemsize: int = 2) -> list[Pass]:
    """One kernel: F never leaves the chip."""
    return _passes(
        batch * tokens * channels * itemsize, ("attention + skip", "q k v x", "out")
    )


def published_two_pass(
    batch: int, tokens: int, channels: int, itemsize: int = 2
) -> list[Pass]:
    """The 11 of the published 11 → 8 count: it includes the QKV projection."""
    return _passes(
        batch * tokens * channels * itemsize,
        ("QKV projection", "x", "q k v"),
        ("attention", "q k v", "F"),
        ("skip", "x F", "out"),
    )


def published_fused(
    batch: int, tokens: int, channels: int, itemsize: int = 2
) -> list[Pass]:
    """The 8 of that count: it takes x to be free in the fused pass."""
    return _passes(
        batch * tokens * channels * itemsize,
        ("QKV projection", "x", "q k v"),
        ("attention + skip", "q k v", "out"),
    )


def honest_fused(
    batch: int, tokens: int, channels: int, itemsize: int = 2
) -> list[Pass]:
    """The same pipeline with x read again where it is used: 9."""
    return _passes(
        batch * tokens * channels * itemsize,
        ("QKV projection", "x", "q k v"),
        ("attention + skip", "q k v x", "out"),
    )


def _passes(size: int, *rows: tuple[str, str, str]) -> list[Pass]:
    return [
        Pass(
            name,
            dict.fromkeys(reads.split(), size),
            dict.fromkeys(writes.split(), size),
        )
        for name, reads, writes in rows
    ]
