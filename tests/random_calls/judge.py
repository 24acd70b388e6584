"""Makes a random call, and compares every result and gradient with float64."""

import contextlib

import torch

from tests.random_calls.call import Call
from tests.random_calls.rounding import bound, whole_gradient

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def check(call: Call) -> float:
    """The largest error of the call's results, in units of its bound.

    AssertionError, which says what is wrong, if it is above 1, if a result is not finite, if
    an argument was written to, or if the same call once more gives something else.
    """
    before = {n: v.clone() for n, v in call.inputs.items() if torch.is_tensor(v)}
    if call.again:  # first with other numbers, which the plan must not remember
        others = {n: v + 1 if type(v) is float else v for n, v in call.inputs.items()}
        results(call, call.ours, others)
    ours, g = results(call, call.ours, call.inputs)
    if call.again:
        once_more, _ = results(call, call.ours, call.inputs)
        for name, value in ours.items():
            same = torch.equal(once_more[name].nan_to_num(), value.nan_to_num())
            assert same, f"{name}: the same call once more gives something else"
    for name, value in before.items():
        assert torch.equal(call.inputs[name], value), f"{name} was written to"

    inputs = call.inputs | {
        n: before[n].to(call.precision) for n in call.casts if n in before
    }
    exact = {n: v.double() if torch.is_tensor(v) else v for n, v in inputs.items()}
    ref, _ = results(call, call.spec, exact, lambda: mode(call), g)
    peer, _ = results(call, call.peer, inputs, g=g)
    with torch.no_grad():
        g = None if g is None else g.double()
        terms = call.terms(g=g, **exact, **call.options)
    if call.together:
        terms = whole_gradient(ref)
    worst = 0.0
    for name, value in ours.items():
        like = peer["out"] if name == "out" else call.inputs[name[1:]]
        assert value.shape == ref[name].shape, f"{name} has shape {list(value.shape)}"
        assert value.dtype == like.dtype, f"{name} is {value.dtype}, not {like.dtype}"
        if not ref[name].to(value.dtype).isfinite().all():
            continue  # too large for its dtype
        missing = value.numel() - value.isfinite().sum().item()
        assert not missing, f"{name}: {missing} of {value.numel()} are not finite"
        error = (value.double() - ref[name]).norm().item()
        allowed = bound(call, name, value.dtype, ref[name], peer[name], terms)
        size = ref[name].norm().item() or 1.0
        assert error <= allowed, (
            f"{name}: relative L2 error {error / size:.2g} above {allowed / size:.2g}"
        )
        worst = max(worst, error / allowed if error else 0.0)
    if call.at_zero:
        assert torch.equal(ours["out"], call.inputs["x"]), "out: not x, at t = 0"
    return worst


def results(call: Call, function, inputs: dict, within=None, g=None) -> tuple:
    """({"out": …, "dq": …}: the result, and the gradients that the call asks for; their g)."""
    with (within or (lambda: surroundings(call)))():
        inputs = {
            name: v.detach().requires_grad_(name in call.wanted)
            if torch.is_tensor(v)
            else v
            for name, v in inputs.items()
        }
        out = function(**inputs, **call.options)
    found = {"out": out.detach()}
    if call.mode != "grad" or not call.wanted:
        return found, None
    g = incoming_gradient(call, out) if g is None else g
    leaves = [inputs[name] for name in call.wanted]
    grads = torch.autograd.grad(out, leaves, g.to(out.dtype))
    named = zip(call.wanted, grads, strict=True)
    return found | {f"d{name}": grad for name, grad in named}, g


def autocast(call: Call):
    device = next(v.device for v in call.inputs.values() if torch.is_tensor(v))
    if call.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, call.autocast)


@contextlib.contextmanager
def surroundings(call: Call):
    with autocast(call), mode(call):
        yield


def mode(call: Call):
    """The specification's and the peer's, too: of the 8-bit model, were it recorded for a
    gradient that nobody asks for, a hundred gigabytes would be kept."""
    return MODES.get(call.mode, torch.enable_grad)()


def incoming_gradient(call: Call, out: torch.Tensor) -> torch.Tensor:
    """Normal numbers like out, with the strides that the call asks for."""
    random = torch.Generator(out.device).manual_seed(out.numel())

    def normal(shape):
        g = torch.randn(shape, generator=random, device=out.device)
        return g.to(out.dtype)

    if call.g == "one number":  # small: sums of it stay within float16
        return (normal(()) / 8).expand(out.shape)
    if call.g == "transposed" and out.ndim > 1:
        return normal(out.mT.shape).mT
    return normal(out.shape)
