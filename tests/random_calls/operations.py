"""Random calls of the operations: the skip, attention, 8-bit attention, the projections."""

import torch
from torch.nn import functional as F

import rcmlib
from rcmlib import reference
from rcmlib.attention import attention
from rcmlib.attention.tiles import choose_sage_tile
from rcmlib.core import device_capability
from rcmlib.reference import eight_bit
from rcmlib.sage import PV, sage_attention
from tests.inputs import torch_attention, torch_skip
from tests.random_calls import rounding
from tests.random_calls.call import Call
from tests.random_calls.draws import HEAD_DIMS, LAYOUTS, STRIDED, Draw

SCORES = 2**24  # of all heads: a float64 attention matrix of 128 MiB


def skip_call(draw: Draw) -> Call:
    rank = draw.kind.choice((1, 2, 3, 3, 3, 4, 5))
    batch, width = draw.batch(), draw.length(draw.length_kind(), 4 * draw.most)
    shape = (batch, *(draw.call.randint(1, 9) for _ in range(rank - 2)), width)[:rank]
    names = ("contiguous",) if rank in (1, 4, 5) else STRIDED
    x, f = (
        draw.tensor(*shape, dtype=dtype, layout=draw.layout(names))
        for dtype in (draw.residual, draw.dtype)
    )
    c_skip, c_out = draw.coefficients(batch)
    inputs = {"x": x, "f": f, "c_skip": c_skip, "c_out": c_out}
    return Call(
        rcmlib.rcm_skip, reference.skip, torch_skip, inputs,
        terms=rounding.skip_terms, wide=("out", "dx", "df"), precision=draw.dtype,
    )  # fmt: skip


def heads_of(draw: Draw) -> tuple[dict, dict]:
    """q, k, v, and scale and is_causal."""
    dim = draw.kind.choice(HEAD_DIMS if draw.large else HEAD_DIMS[:5])
    heads = draw.kind.choice((1, 2, 3, 8) if draw.large else (1, 2, 3))
    q_kind, kv_kind = draw.length_kind(), draw.length_kind()
    square = draw.kind.random() < 0.5
    many = draw.large and draw.kind.random() < 0.4  # rows: enough for all SMs
    layouts = [draw.layout(LAYOUTS), *[draw.layout(LAYOUTS)] * 2]
    is_causal = draw.kind.random() < 0.4
    scores = SCORES + 1
    while scores > SCORES:
        batch = draw.batch()
        q_len = draw.length(q_kind, 256 if many else None)
        kv_len = q_len if square else draw.length(kv_kind)
        if many:
            batch, heads = 5, 40
        scores = batch * heads * q_len * kv_len
    q, k, v = (
        draw.tensor(batch, heads, n, dim, layout=layout)
        for n, layout in zip((q_len, kv_len, kv_len), layouts, strict=True)
    )
    scale = None if draw.call.random() < 0.6 else 10 ** draw.call.uniform(-2, 0)
    return {"q": q, "k": k, "v": v}, {"scale": scale, "is_causal": is_causal}


def residual_of(draw: Draw, q, k, v) -> dict:
    batch, heads, tokens, dim = q.shape
    x = draw.tensor(
        batch, tokens, heads * dim, dtype=draw.residual, layout=draw.layout()
    )
    c_skip, c_out = draw.coefficients(batch)
    return {"q": q, "k": k, "v": v, "x": x, "c_skip": c_skip, "c_out": c_out}


def exact_attention(q, k, v, **options):
    return reference.merge_heads(reference.attention(q, k, v, **options))


def peer_attention(q, k, v, **options):
    q, k, v = (t.contiguous() for t in (q, k, v))
    return reference.merge_heads(F.scaled_dot_product_attention(q, k, v, **options))


ATTENTION = {
    "casts": ("q", "k", "v"),
    "terms": rounding.attention_terms,
    "wide": ("dx",),
}


def attention_call(draw: Draw) -> Call:
    inputs, options = heads_of(draw)
    return Call(
        attention, exact_attention, peer_attention, inputs, options, **ATTENTION
    )


def rcm_attention_call(draw: Draw) -> Call:
    inputs, options = heads_of(draw)
    inputs = residual_of(draw, **inputs)
    functions = rcmlib.rcm_attention, reference.rcm_attention, torch_attention
    return Call(*functions, inputs, options, **ATTENTION)


def eight_bit_model(q, k, v, pv, smooth_q, **options):
    """What the kernel should compute; with q smoothed, too, its errors have this size."""
    pv = pv or "fp8"
    block_n = choose_sage_tile(q.shape[-1], pv, device_capability(q.device)).block_n
    fp8 = pv != "fp16"
    sums = pv if pv == "fp8_fp16" or (pv == "fp8_short" and q.is_cuda) else "fp8"
    model = eight_bit.sage_attention(  # the interpreter's sums are never short
        q, k, v, fp8_p=fp8, fp8_v=fp8, sums=sums,
        k_group=block_n, block_n=block_n, **options,
    )  # fmt: skip
    return reference.merge_heads(model).to(q.dtype)


def without_roundings(function):
    """function, which knows nothing of the options that only choose roundings."""

    def exact(*, scale, is_causal, pv, smooth_q, smooth_k, smooth_v, **inputs):
        return function(**inputs, scale=scale, is_causal=is_causal)

    return exact


def sage_call(draw: Draw) -> Call:
    inputs, options = heads_of(draw)
    options["pv"] = draw.kind.choice((None, *PV))
    for name in ("smooth_q", "smooth_k", "smooth_v"):
        options[name] = draw.kind.random() < 0.5
    return Call(
        sage_attention, without_roundings(exact_attention), eight_bit_model,
        inputs, options, casts=("q", "k", "v"),
        terms=without_roundings(rounding.attention_terms),
    )  # fmt: skip


def rcm_sage_call(draw: Draw) -> Call:
    call = sage_call(draw)
    call.inputs = residual_of(draw, **call.inputs)
    call.ours = rcmlib.rcm_sage_attention
    call.spec = without_roundings(reference.rcm_attention)

    def peer(q, k, v, x, c_skip, c_out, **options):
        f = eight_bit_model(q, k, v, **options)
        return reference.skip(x, f, c_skip, c_out).to(x.dtype)

    call.peer = peer
    return call


def projection_inputs(draw: Draw) -> dict:
    """a, weight, bias and x; on a GPU some of the sizes that have a tile of their own."""
    size = draw.kind.choice(("small", "small", "deep", "wide"))
    lengths = draw.length_kind(), draw.length_kind(), draw.length_kind()
    if not draw.large or size == "small":
        tokens, depth, cols = (
            draw.length(kind, min(draw.most, 700)) for kind in lengths
        )
    elif size == "deep":
        tokens, depth, cols = draw.length(lengths[0]), 2304, 256
    else:
        tokens, depth, cols = 1024 + draw.length(lengths[0], 512), 192, 2304
    batch = 5 if draw.large and size == "wide" else draw.batch()
    biased = draw.kind.random() < 0.7
    return {
        "a": draw.tensor(batch, tokens, depth, layout=draw.layout()),
        "weight": draw.tensor(cols, depth, layout=draw.layout(), size=depth**-0.5),
        "bias": draw.tensor(cols) if biased else None,
        "x": draw.tensor(
            batch, tokens, cols, dtype=draw.residual, layout=draw.layout()
        ),
    }


def torch_projection(a, weight, bias, x, c_skip, c_out):
    return torch_skip(x, F.linear(a, weight, bias).to(x.dtype), c_skip, c_out)


def torch_gated(a, weight, bias, x, gate):
    gate = gate[:, None] if gate.ndim == 2 else gate
    return (x + gate * F.linear(a, weight, bias)).to(x.dtype)


PROJECTION = {
    "casts": ("a", "weight", "bias"),
    "terms": rounding.projection_terms,
    "wide": ("out", "dx"),
}


def projection_call(draw: Draw) -> Call:
    inputs = projection_inputs(draw)
    inputs["c_skip"], inputs["c_out"] = draw.coefficients(len(inputs["x"]))
    functions = rcmlib.rcm_projection, reference.rcm_projection, torch_projection
    return Call(*functions, inputs, **PROJECTION)


def gated_call(draw: Draw) -> Call:
    inputs = projection_inputs(draw)
    shape = inputs["x"].shape
    shape = shape[::2] if draw.kind.random() < 0.5 else shape
    dtype = draw.kind.choice((draw.dtype, torch.float32))
    inputs["gate"] = draw.tensor(*shape, dtype=dtype, layout=draw.layout())
    functions = rcmlib.gated_projection, reference.gated_projection, torch_gated
    return Call(*functions, inputs, **PROJECTION)
