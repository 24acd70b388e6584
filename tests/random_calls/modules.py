"""Random calls of the modules, of a fused Wan block, and of the coefficients.

x is normal here: where a softmax saturates, gradients behind it are differences of equals.
"""

import math
from collections.abc import Callable

import torch
from torch.func import functional_call

import rcmlib
from rcmlib import wan
from tests.random_calls.call import Call
from tests.random_calls.draws import HEAD_DIMS, Draw


def module_call(draw: Draw, ours, peer, inputs: dict, *grid) -> Call:
    """inputs: x and what follows it; the parameters, drawn anew, come behind them."""
    names = tuple(inputs)

    def caller(module):
        def call(**inputs):
            arguments = (*(inputs.pop(name) for name in names), *grid)
            return functional_call(module, inputs, arguments)

        return call

    parameters = {
        name: draw.tensor(*p.shape, size=p.shape[-1] ** -0.5, shifts=False)
        for name, p in ours.named_parameters()
    }
    functions = caller(ours), caller(peer), caller(peer)
    # ∂L/∂t is a sum that cancels, and t may be a number (tests/test_modules.py).
    return Call(*functions, inputs | parameters, constant=("t",), together=True)


def layer_call(layer: Callable, **peer_options) -> Callable[[Draw], Call]:
    def draw_layer(draw: Draw) -> Call:
        heads = draw.kind.choice((1, 2, 3, 8) if draw.large else (1, 2))
        dim = heads * draw.kind.choice(HEAD_DIMS[:7] if draw.large else HEAD_DIMS[:3])
        options = (dim, heads, draw.kind.random() < 0.7, draw.call.uniform(0.3, 2))
        batch = draw.batch()
        tokens = draw.length(draw.length_kind(), min(draw.most, 512))
        x = draw.tensor(batch, tokens, dim, layout=draw.layout(), shifts=False)
        t = draw.coefficient(batch, 0 if draw.call.random() < 0.1 else None)
        inputs = {"x": x, "t": abs(t)}
        peer = rcmlib.BaselineRCMAttention(*options, **peer_options)
        return module_call(draw, layer(*options), peer, inputs)

    return draw_layer


def wan_call(draw: Draw) -> Call:
    heads = draw.kind.choice((1, 2, 3))
    dim = heads * draw.kind.choice((16, 24, 64, 128) if draw.large else (16, 24))
    most = 10 if draw.large else 3
    # Two tokens at least: a single key sends nothing to the weights of q and k.
    grid = 2, draw.call.randint(1, most), draw.call.randint(1, most)
    options = dim, 2 * dim, heads, draw.kind.random() < 0.7
    batch = draw.batch()
    x = draw.tensor(batch, math.prod(grid), dim, layout=draw.layout(), shifts=False)
    e = draw.tensor(batch, 6, dim, dtype=torch.float32, shifts=False)
    block, fused = wan.WanBlock(*options), wan.WanBlock(*options)
    assert rcmlib.integrate.fuse(fused).replaced
    return module_call(draw, fused, block, {"x": x, "e": e}, grid)


def edm_in_other_words(t, sigma):
    c_in = (t.double().square() + sigma**2) ** -0.5
    return (sigma * c_in).square(), sigma * t * c_in, c_in


def trigflow_in_other_words(t, sigma):
    return (
        (torch.pi / 2 - t).sin(),
        -sigma * (torch.pi / 2 - t).cos(),
        0 * t + 1 / sigma,
    )


def rectified_flow_in_other_words(t, _sigma):
    c = 0.5**0.5 / (t + torch.pi / 4).sin()  # cos t + sin t = √2 sin(t + π/4)
    return c, -t.sin() * c, c


CONVENTIONS = {
    rcmlib.edm: (50, edm_in_other_words),
    rcmlib.trigflow: (1.5, trigflow_in_other_words),
    lambda t, _sigma: rcmlib.rectified_flow(t): (1.5, rectified_flow_in_other_words),
}


def coefficients_call(draw: Draw) -> Call:
    convention = draw.call.choice(list(CONVENTIONS))
    largest, formula = CONVENTIONS[convention]
    shape = [draw.call.randint(1, 5) for _ in range(draw.call.randint(0, 3))]
    t = largest * torch.rand(shape, generator=draw.values, device=draw.device)
    inputs = {"t": t.to(draw.call.choice((torch.float64, draw.dtype)))}

    def stacked(function):
        return lambda t, sigma: torch.stack(
            [torch.as_tensor(c) for c in function(t, sigma)[:3]]
        )

    ours, other = stacked(convention), stacked(formula)
    options = {"sigma": draw.call.uniform(0.3, 2)}
    return Call(
        ours, other, lambda t, sigma: other(t.double(), sigma), inputs, options,
        precision=torch.float64,
    )  # fmt: skip
