"""Attention forward with the skip fused in: out = c_skip·x + c_out·softmax(q kᵀ·scale) v.

q [B, H, Nq, D]; k, v [B, H, Nkv, D], any strides with a contiguous last dimension;
x, out [B, Nq, H·D]. One program owns block_m queries of one head and walks over the keys
block_n at a time (online softmax: Milakov & Gimelshein 2018; this loop order: Dao 2023,
FlashAttention-2). Storing f at column h·D merges the heads; the skip is applied just before.

HBM: q, k, v, x are read, out is written. f exists only in registers, D float32 numbers a row.
For a backward pass (backward.py) f and lse [B, H, Nq] are written too.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rcmlib import core
from rcmlib.attention.stamps import stamp
from rcmlib.attention.tiles import LOG2_E, SHORT, choose_team, choose_tile, few_rows
from rcmlib.core import launch
from rcmlib.core.epilogue import load_coefficient, skip_epilogue
from rcmlib.core.rows import Place, Rows, key_range, load_rows, mask_scores, own_rows

LIMIT = tl.constexpr(2.0**120)  # of a sum of weights; 1 / LIMIT is a normal number, too
LOWEST = tl.constexpr(-3.0e38)  # of all maxima: -inf - -inf would be a NaN in exp2


class Sums(NamedTuple):
    """The softmax of a block of rows so far."""

    acc: tl.tensor  # [M, block_d]: v, weighted by p = exp2(score − m)
    m: tl.tensor  # [M]: the largest score, in units of log2
    l: tl.tensor  # [M, 8]: the weights' sum, in eight parts; on Hopper each one thread's own


class Results(NamedTuple):
    """What the epilogue needs: x, out, saved_f [B, Nq, H·D]; c_skip, c_out numbers or [B]."""

    x: tl.tensor  # None: attention alone
    x_strides: tl.tuple  # between samples and tokens
    c_skip: tl.tensor
    c_out: tl.tensor
    out: tl.tensor
    saved_f: tl.tensor  # None: no backward pass will need it; so lse
    lse: tl.tensor
    heads: tl.tensor
    q_len: tl.tensor


@triton.jit
def no_sums(M: tl.constexpr, BLOCK_D: tl.constexpr):
    m = tl.full([M], LOWEST, tl.float32)
    l = tl.zeros([M, 8], tl.float32)
    return Sums(tl.zeros([M, BLOCK_D], tl.float32), m, l)


@triton.jit
def softmax_step(s, sums, qk_scale, j, first_row, kv_len, HOW: tl.constexpr,
                 MASK: tl.constexpr, FIXED: tl.constexpr):  # fmt: skip
    """For the scores s of the key tile at j: (the weights p, sums with acc yet to add p v).

    A larger maximum rescales what was summed before. FIXED: m stays what it is, whatever the
    scores are.
    """
    acc, m, l = sums
    if MASK:
        s = mask_scores(s, j, first_row, kv_len, float("-inf"), HOW.causal)
    if not FIXED:
        larger = tl.maximum(m, tl.max(s, 1) * qk_scale)
        alpha = tl.exp2(m - larger)[:, None]
        acc, m, l = acc * alpha, larger, l * alpha
    p = tl.exp2(s * qk_scale - m[:, None])
    return p, Sums(acc, m, l + tl.sum(p.reshape(p.shape[0], p.shape[1] // 8, 8), 1))


@triton.jit
def attend(upper, lower, qt, qt_lower, keys, values, at, start, stop, qk_scale, stamps,
           HOW: tl.constexpr, MASK: tl.constexpr, FIXED: tl.constexpr):  # fmt: skip
    """One softmax step for each key tile in [start, stop).

    With HOW.two there is a second, lower block of rows: a key tile, once fetched, serves both.
    """
    M: tl.constexpr = HOW.block_m
    N: tl.constexpr = HOW.block_n
    PRECISION: tl.constexpr = HOW.precision
    for j in tl.range(start, stop, N):
        stamp(stamps, 0, j // N, "begins")
        kt = load_rows(keys, at, j, N, HOW, MASK)  # [N, block_d]
        s = tl.dot(qt, kt.T, input_precision=PRECISION)  # [M, N]
        if HOW.two:
            s_lower = tl.dot(qt_lower, kt.T, input_precision=PRECISION)
        stamp(stamps, 0, j // N, "scores")
        p, upper = softmax_step(s, upper, qk_scale, j, at.row, keys.length, HOW, MASK,
                                FIXED)  # fmt: skip
        stamp(stamps, 0, j // N, "weights")
        vt = load_rows(values, at, j, N, HOW, MASK)  # [N, block_d]
        acc = tl.dot(p.to(vt.dtype), vt, upper.acc, input_precision=PRECISION)
        upper = Sums(acc, upper.m, upper.l)
        if HOW.two:  # while the tensor core does that product, the other block's softmax
            p, lower = softmax_step(s_lower, lower, qk_scale, j, at.row + M, keys.length,
                                    HOW, MASK, FIXED)  # fmt: skip
            stamp(stamps, 1, j // N, "weights")
            acc = tl.dot(p.to(vt.dtype), vt, lower.acc, input_precision=PRECISION)
            lower = Sums(acc, lower.m, lower.l)
    return upper, lower


@triton.jit
def overflowed(sums):
    """Did a weight make one of these sums too large for float32, or not a number?"""
    fine = (tl.abs(sums.acc) < LIMIT) & (tl.sum(sums.l, 1) < LIMIT)[:, None]
    return tl.min(tl.min(fine.to(tl.int32), 1), 0) == 0


@triton.jit
def finish_rows(sums, xt, to, at, HOW: tl.constexpr):
    """The epilogue of one block of rows: f = acc / l, then `merge` for all its channels."""
    M: tl.constexpr = HOW.block_m
    HALF: tl.constexpr = HOW.block_d // 2
    l = tl.sum(sums.l, 1)
    f = sums.acc * (1 / l)[:, None]
    if HOW.block_d == 128:  # by halves: for all of x and f there are too few registers
        left, right = tl.split(f.reshape(M, 2, HALF).permute(0, 2, 1))
        merge(left, 0, None, to, at, HOW)
        merge(right, HALF, None, to, at, HOW)
    else:
        merge(f, 0, xt, to, at, HOW)
    if to.lse is not None:  # in units of log2, as m
        n = at.row + tl.arange(0, M)
        row = (tl.cast(at.sample, tl.int64) * to.heads + at.head) * to.q_len + n
        tl.store(to.lse + row, sums.m + tl.log2(l), mask=n < to.q_len)


@triton.jit
def merge(f, channel, xt, to, at, HOW: tl.constexpr):
    """The skip on f, which is a head's channels from `channel` on, and the stores."""
    D: tl.constexpr = HOW.head_dim
    rows = at.row + tl.arange(0, f.shape[0])[:, None]
    d = channel + tl.arange(0, f.shape[1])[None, :]
    inside = (rows < to.q_len) & (d < D)
    # In 64 bits: offsets pass 2³¹ in large tensors.
    sample, n = tl.cast(at.sample, tl.int64), rows.to(tl.int64)
    tile = (sample * to.q_len + n) * to.heads * D + at.head * D + d
    if to.saved_f is not None:
        tl.store(to.saved_f + tile, f.to(to.saved_f.dtype.element_ty), mask=inside)
    if to.x is not None:
        if xt is None:
            xt = load_residual(to, at, channel, f.shape[0], f.shape[1], HOW)
        f = skip_epilogue(xt.to(tl.float32), f,
                          load_coefficient(to.c_skip, at.sample, HOW.per_sample),
                          load_coefficient(to.c_out, at.sample, HOW.per_sample))  # fmt: skip
    # No program comes back to x or out: in L2 they make room for k and v.
    tl.store(to.out + tile, f.to(to.out.dtype.element_ty), mask=inside,
             eviction_policy="evict_first")  # fmt: skip


@triton.jit
def load_residual(to, at, channel, M: tl.constexpr, COLS: tl.constexpr, HOW: tl.constexpr):
    """x's channels of a head from `channel` on, [M, COLS]."""
    D: tl.constexpr = HOW.head_dim
    rows = at.row + tl.arange(0, M)[:, None]
    d = channel + tl.arange(0, COLS)[None, :]
    stride_b, stride_n = to.x_strides
    tile = to.x + tl.cast(at.sample, tl.int64) * stride_b + rows.to(tl.int64) * stride_n
    tile = tile + at.head * D + d
    return tl.load(tile, mask=(rows < to.q_len) & (d < D), eviction_policy="evict_first")


@triton.jit
def attention_kernel(q, k, v, x, out, saved_f, lse, c_skip, c_out, qk_scale,
                     heads, q_len, kv_len, strides, stamps, HOW: tl.constexpr):  # fmt: skip
    """strides: q's, k's, v's (samples, heads, rows), x's (samples, tokens). stamps: None, or
    see `stamps.py`. HOW: a Variant."""
    M: tl.constexpr = HOW.block_m
    BLOCK_D: tl.constexpr = HOW.block_d
    ROWS: tl.constexpr = 2 * M if HOW.two else M
    queries = Rows(q, strides[0], q_len)
    keys, values = Rows(k, strides[1], kv_len), Rows(v, strides[2], kv_len)
    to = Results(x, strides[3], c_skip, c_out, out, saved_f, lse, heads, q_len)
    at = own_rows(heads, q_len, ROWS, HOW.causal)
    below = Place(at.sample, at.head, at.row + M)
    stamp(stamps, 0, 0, "sm")
    qt = load_rows(queries, at, at.row, M, HOW, True)  # [M, block_d]
    qt_lower = qt
    if HOW.two:
        qt_lower = load_rows(queries, at, below.row, M, HOW, True)
    # Where registers allow, x is fetched now and arrives in the loop's shadow. Not before q:
    # all programs start together, and the loop would wait for x in the queue to HBM.
    xt = None
    if x is not None and HOW.tma and BLOCK_D <= 64 and not HOW.ragged:
        xt = load_residual(to, at, 0, M, BLOCK_D, HOW)
    upper = no_sums(M, BLOCK_D)
    lower = upper

    # The last tiles first: only they may need a mask, and they find the maximum that is kept.
    EDGE: tl.constexpr = HOW.ragged or HOW.causal
    whole, stop = key_range(kv_len, at.row, ROWS, HOW)
    if HOW.fixed:
        # Of half a tile at least (not along the diagonal): one key's score may be far too low.
        N: tl.constexpr = HOW.block_n
        whole = tl.minimum(whole, (stop - N // 2) // N * N)
    if HOW.fixed or EDGE:
        upper, lower = attend(upper, lower, qt, qt_lower, keys, values, at, whole, stop,
                              qk_scale, stamps, HOW, EDGE, False)  # fmt: skip
    upper, lower = attend(upper, lower, qt, qt_lower, keys, values, at, 0, whole,
                          qk_scale, stamps, HOW, False, HOW.fixed)  # fmt: skip
    if HOW.fixed:
        again = overflowed(upper)
        if HOW.two:
            again |= overflowed(lower)
        if again:
            # Scores some 80 above that maximum (2¹²⁰ = e⁸³), or something not finite.
            none = no_sums(M, BLOCK_D)
            upper, lower = attend(none, none, qt, qt_lower, keys, values, at, 0, stop,
                                  qk_scale, stamps, HOW, EDGE, False)  # fmt: skip
    finish_rows(upper, xt, to, at, HOW)
    if HOW.two:
        finish_rows(lower, None, to, below, HOW)


def attention_plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor | None,
    per_sample: bool, is_causal: bool, tile: launch.Tile | launch.Team | None = None,
) -> launch.Plan:  # fmt: skip
    """The launch of `attention_kernel`, or of Hopper's, for tensors like these. tile: instead
    of the chosen tile or team."""
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    capability = core.device_capability(q.device)
    compiled = not core.interpreting()
    if tile is None and compiled and launch.descriptors_allowed(*sources(q, k, v, x)):
        shape, sms = (batch * heads, q_len, kv_len, head_dim), core.multiprocessors(q.device)
        tile = choose_team(shape, q.dtype, capability, is_causal, sms)
    if isinstance(tile, launch.Team):
        hopper_plan = core.load("rcmlib.attention.hopper").hopper_plan
        return hopper_plan(q, k, v, x, per_sample, is_causal, tile)
    block_d = triton.next_power_of_2(head_dim)
    few = few_rows(batch * heads * triton.cdiv(q_len, 128), q.device)
    tma = not few and launch.descriptors_allowed(q, k, v)
    tma = tma and core.copy_engine(q.dtype, capability)
    if tile is None:
        # Along the diagonal, one of two blocks would wait for the other.
        pairs, long = not (few or is_causal), kv_len > SHORT
        tile = choose_tile(head_dim, q.dtype, capability, tma, pairs, long)
        if core.interpreting() and q.dtype == torch.float32:
            tile = replace(tile, fixed=long)  # the interpreter's stand-in for bfloat16
    m, n = tile.block_m, tile.block_n
    how = launch.Variant(
        **vars(tile), head_dim=head_dim, block_d=block_d, tma=tma, causal=is_causal,
        ragged=kv_len % n != 0, per_sample=per_sample, precision=core.dot_precision(q.dtype),
    )  # fmt: skip
    x_strides = (0, 0) if x is None else x.stride()[:2]
    strides = (*(t.stride()[:3] for t in (q, k, v)), x_strides)
    return launch.Plan(
        attention_kernel, batch * heads * triton.cdiv(q_len, m << tile.two),
        heads, q_len, kv_len, strides, HOW=how, stamps=None,
        boxes=launch.boxes_of_rows((q, k, v), (m, n, n), block_d) if tma else (),
    )  # fmt: skip


def sources(q, k, v, x) -> tuple[torch.Tensor, ...]:
    """What is read, as [B, H, N, D]: x, if there is one, as its heads lie in it."""
    if x is None:
        return q, k, v
    return q, k, v, x.unflatten(-1, (q.shape[1], q.shape[3])).transpose(1, 2)


def attention_forward(
    q, k, v, x, c_skip, c_out, scale, is_causal, save=False,
    plan: launch.Plan | launch.Tile | launch.Team | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Launches `attention_kernel` on checked inputs (see `rcmlib.rcm_attention`), or Hopper's.

    c_skip, c_out: two floats or two [B]. plan: the one of these arguments, if it is known; or
    a tile or team, to be planned with.
    Returns (out,), or with `save` what the backward pass needs: (out, f, lse). With x = None
    it is attention alone; then out is f, and the f returned is empty.
    """
    batch, heads, q_len, head_dim = q.shape
    tokens = (batch, q_len, heads * head_dim)
    out = launch.result(q if x is None else x, tokens)
    f = lse = None
    if save:
        f = launch.result(q, tokens, wanted=x is not None)
        lse = launch.result(q, (batch, heads, q_len), torch.float32)
    if not isinstance(plan, launch.Plan):
        per_sample, tile = isinstance(c_skip, torch.Tensor), plan
        make = partial(attention_plan, q, k, v, x, per_sample, is_causal, tile)
        kind = "attention" if x is None else "rcm_attention"
        key = launch.key_of(kind, (q, k, v, x, c_skip, c_out), is_causal, save)
        plan = launch.planned(key, make) if tile is None else make()
    f_out = None if x is None else f
    plan.launch(q, k, v, x, out, f_out, lse, c_skip, c_out, scale * LOG2_E)
    return (out, f, lse) if save else (out,)
