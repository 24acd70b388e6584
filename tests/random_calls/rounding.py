"""How large an error a random call may have: the policy of DESIGN, for gradients too.

    ‖ours − ref‖ ≤ 2·‖peer − ref‖ + 2·roundoff

ref is float64, peer is PyTorch in the same precision (for 8 bits: their model). The roundoff
is that of the result or, where it is larger, of the terms that it is a sum of: they may cancel,
in ∂L/∂q of a query with one key all of them. √Σ terms² is what independent roundings add up to.
"""

import torch

from rcmlib import reference

# Unit roundoff; float32 sums are held to 1e-6, and float64 formulas to 1e-12.
UNIT = {
    torch.float64: 0.5e-12,
    torch.float32: 0.5e-6,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def bound(call, name, dtype, ref, peer, terms: dict[str, float]) -> float:
    """The largest ‖ours − ref‖ that the call's result of this name, in dtype, may have."""
    if (
        not peer.isfinite().all()
    ):  # it overflows where ours does not: nothing to compare with
        return float("inf")
    precision = dtype if name in call.wide else call.precision
    size = max(terms.get(name, 0.0), ref.norm().item())
    if precision == torch.float32:
        # exp(s) multiplies what a float32 score has lost.
        size *= max(1.0, terms.get("scores", 0.0) / 4)
    rounded = (ref.to(dtype).double() - ref).norm().item()
    # A coefficient's gradient may be a sum over the samples in its own, coarser dtype.
    roundoff = max(rounded, max(UNIT[precision], UNIT[dtype]) * size)
    if precision != call.precision:  # the peer rounds what ours does not
        # Beneath are 16-bit products. A tensor core cuts off what IEEE sums would round.
        return 4 * 2 * roundoff
    return 2 * (peer.double() - ref).norm().item() + 2 * roundoff


def no_terms(g=None, **inputs) -> dict[str, float]:
    return {}


def whole_gradient(ref: dict[str, torch.Tensor]) -> dict[str, float]:
    """For modules: where a parameter's gradient cancels, as that of k's bias, all together."""
    names = [name for name in ref if name != "out"]
    squares = [ref[name].square().sum() for name in names]
    return dict.fromkeys(names, sum(squares, torch.zeros(())).sqrt().item())


def skip_terms(g=None, *, x, f, c_skip, c_out) -> dict[str, float]:
    """√Σ terms² of each result. g: ∂L/∂out. f, where it is a sum itself: √Σ terms² of it,
    or |f|, as which it is rounded, where that is larger."""
    c_skip = reference.per_sample(c_skip, x)
    if not torch.is_tensor(c_out) or c_out.ndim < 2:
        c_out = reference.per_sample(c_out, x)
    elif c_out.ndim < x.ndim:  # a gate [B, C]
        c_out = c_out[:, None]
    squares = {"out": c_skip**2 * x**2 + c_out**2 * f**2}
    if g is not None:
        squares |= {"df": (c_out * g) ** 2, "dx": (c_skip * g) ** 2}
        squares |= {"dc_skip": (g * x) ** 2, "dc_out": (g * f) ** 2}
    return {name: t.sum().sqrt().item() for name, t in squares.items()}


def attention_terms(
    g=None, *, q, k, v, x=None, c_skip=0.0, c_out=1.0, scale, is_causal
) -> dict[str, float]:
    """As `reference.rcm_attention_backward`, in squares; and how large scores are."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p = reference.probabilities(q, k, scale, is_causal)
    f_terms = torch.maximum(p.square() @ v.square(), (p @ v).square())
    f = reference.merge_heads(f_terms).sqrt()
    x = torch.zeros_like(f) if x is None else x
    terms = skip_terms(g, x=x, f=f, c_skip=c_skip, c_out=c_out)
    terms["scores"] = (q @ k.mT).abs().max().item() * scale
    if g is not None:
        g = g.unflatten(-1, (q.shape[1], -1)).transpose(1, 2).square()
        c = reference.per_sample(c_out, q) ** 2
        row = (g * f_terms).sum(-1, keepdim=True)  # of ∂L/∂F·F, which all keys share
        ds = p.square() * (g @ v.square().mT + row)
        squares = {
            "dq": c * scale**2 * (ds @ k.square() + row * (p @ k).square()),
            "dk": c * scale**2 * (ds.mT @ q.square()),
            "dv": c * (p.square().mT @ g),
        }
        terms |= {name: t.sum().sqrt().item() for name, t in squares.items()}
    return terms


def projection_terms(
    g=None, *, a, weight, bias, x, c_skip=1.0, c_out=None, gate=None
) -> dict[str, float]:
    """gate: instead of c_out. The gradients of a, weight and bias are sums of c_out·g."""
    c_out = c_out if gate is None else gate
    f_terms = a.square() @ weight.square().mT
    f_terms = f_terms if bias is None else f_terms + bias.square()
    f = a @ weight.mT if bias is None else a @ weight.mT + bias
    f_terms = torch.maximum(f_terms, f.square())
    terms = skip_terms(g, x=x, f=f_terms.sqrt(), c_skip=c_skip, c_out=c_out)
    if g is not None:
        factor = gate if gate is not None else reference.per_sample(c_out, x)
        factor = factor[:, None] if factor.ndim < x.ndim else factor
        df = (factor * g).square()
        squares = {
            "da": df @ weight.square(),
            "dweight": df.flatten(0, 1).mT @ a.square().flatten(0, 1),
            "dbias": df,
        }
        terms |= {name: t.sum().sqrt().item() for name, t in squares.items()}
        terms["dgate"] = terms["dc_out"]
    return terms
