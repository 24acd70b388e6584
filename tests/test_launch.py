"""Planned launches: the kernel that Triton would choose at every layout, and no tensor kept."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import rcmlib
from rcmlib.attention import attention, forward
from rcmlib.core import checks, launch
from rcmlib.core.launch import PLANS, key_of
from rcmlib.sage import sage_attention
from tests.inputs import heads
from tests.test_bad_input import CASES, both_attentions, good


def test_every_planned_launch_is_the_one_that_triton_would_choose():
    """`planned_launches.py` asks it, for the compiling Triton, without a GPU or a compiler."""
    script = Path(__file__).with_name("planned_launches.py")
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{script.stem}"],
        cwd=script.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    launches, kernels = map(int, done.stdout.split())
    assert launches > 4 * kernels > 100


def test_a_plan_keeps_no_tensor(device):
    inputs = heads((1, 2, 20, 20, 16), torch.float32, device)
    out = rcmlib.rcm_attention(*inputs)
    refs = [weakref.ref(t) for t in (*inputs, out)]
    del inputs, out
    gc.collect()
    assert not any(ref() is not None for ref in refs)


def test_calls_of_one_layout_share_a_plan_and_nothing_else(device):
    """The number of the coefficients, and the numbers in the tensors, are no part of it."""
    first, second = (
        heads((1, 2, 20, 20, 16), torch.float32, device, seed) for seed in (0, 1)
    )
    for (q, k, v, x, *_), c in ((first, 0.25), (second, 0.5), (first, 0.5)):
        out = rcmlib.rcm_attention(q, k, v, x, 1 - c, c)
        expected = (1 - c) * x + c * attention(q, k, v)
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6)


def misaligned(t):
    """A copy with the same strides, one element into its storage."""
    wide = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return wide[1:].view(t.shape).copy_(t)


def test_a_misaligned_tensor_has_a_plan_of_its_own(device, monkeypatch):
    q, k, v, x, *c = heads((1, 2, 20, 20, 16), torch.float16, device)
    others = [misaligned(t) for t in (q, k, v, x)]
    expected = rcmlib.rcm_attention(q, k, v, x, *c)
    for inputs in ((q, k, v, x), others, (q, others[1], v, x), others, (q, k, v, x)):
        out = rcmlib.rcm_attention(*inputs, *c)
        assert torch.allclose(out, expected, rtol=2e-3, atol=2e-3)
    options = ("rcm_attention", (q, k, v, x, *c)), ("rcm_attention", (*others, *c))
    plans = [PLANS.get(key_of(*key, False, False)) for key in options]
    assert None not in plans and plans[0] is not plans[1]
    assert not plans[1].boxes  # the copy engine cannot address these
    monkeypatch.setattr(forward, "few_rows", lambda *_: False)
    assert forward.attention_plan(q, k, v, x, True, False).boxes


def test_what_a_launch_depends_on_tells_keys_apart():
    t = torch.zeros(2, 3)
    arguments = [
        (t,), (t.half(),), (t.to("meta"),), (t.mT,), (t[:1],), (misaligned(t),), (t, t),
        (None,), (1.0,), (None, 1.0), (1.0, None), (), (None, None), (t, 1.0), (t, None),
    ]  # fmt: skip
    options = [(), (True,), (1,), (0,), (False,), ("1",), (None,), (True, True),
               (torch.float32,), (torch.float16,)]  # fmt: skip
    keys = {key_of("a", a, *o) for a in arguments for o in options}
    assert len(keys) == len(arguments) * len(options)
    assert not keys & {key_of("b", a, *o) for a in arguments for o in options}
    assert key_of("a", (t, 0.5, None)) == key_of("a", (t + 1, 0.25, None))


def test_a_plan_is_made_once_for_its_key_and_the_cache_does_not_grow_for_ever(
    monkeypatch,
):
    monkeypatch.setattr(launch, "PLANS", {})
    monkeypatch.setattr(launch, "KEPT", 2)
    first = launch.planned(("a",), object)
    assert launch.planned(("a",), object) is first
    launch.planned(("b",), object)
    launch.planned(("c",), object)  # the others are forgotten
    assert set(launch.PLANS) == {("c",)}
    assert launch.planned(("a",), object) is not first


# ---- the first launch, where something is missing ----


class Raising:
    """A kernel whose launch ends in `action`."""

    def __init__(self, action):
        self.action = action

    def __getitem__(self, grid):
        return lambda *_: self.action()


CAUSES = RuntimeError, OSError, subprocess.CalledProcessError  # CC decides which


@pytest.mark.parametrize(
    "compiler", [None, "", "no-such-cc", "ccache gcc", "/", "false"]
)
def test_without_a_c_compiler_one_sentence_says_how_to_get_one(
    compiler, monkeypatch, tmp_path
):
    """By Triton's own way to look for it and to start it."""
    build = pytest.importorskip("triton.runtime.build")
    if find := getattr(
        build, "_find_compiler", None
    ):  # it remembers, from Triton 3.8 on
        monkeypatch.setattr(build, "_find_compiler", find.__wrapped__)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if compiler is None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", "")
    else:
        monkeypatch.setenv("CC", compiler)
    kernel = Raising(lambda: build.compile_module_from_src("int i;", "launcher"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="apt install gcc, or CC=") as raised:
            launch.Plan(kernel, 1).launch()
        assert isinstance(raised.value.__cause__, CAUSES)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", ""), RuntimeError("no compiler")]
)
def test_another_error_of_a_first_launch_stays_as_it_is(error):
    def fail():
        raise error

    with pytest.raises(type(error)) as raised:
        launch.Plan(Raising(fail), 1).launch()
    assert raised.value is error and error.__cause__ is None


# ---- calls like an earlier one ----


class Seen(TorchDispatchMode):
    """The names of our operators that the dispatcher saw."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "rcmlib":
            self.names.append(op._schema.name)
        return op(*args, **(kwargs or {}))


def arguments(device, dtype=torch.float32, seed=0):
    q, k, v, x, c_skip, c_out = heads((2, 2, 6, 6, 16), dtype, device, seed)
    return q, k, v, x, c_skip, c_out, x[:, 0, :].repeat(32, 1)[:32].contiguous()


FUNCTIONS = {
    "rcm_attention": lambda q, k, v, x, a, b, w: rcmlib.rcm_attention(q, k, v, x, a, b),
    "attention": lambda q, k, v, x, a, b, w: attention(q, k, v, is_causal=True),
    "rcm_sage_attention": lambda q, k, v, x, a, b, w: rcmlib.rcm_sage_attention(
        q, k, v, x, a, b
    ),
    "rcm_skip": lambda q, k, v, x, a, b, w: rcmlib.rcm_skip(x, 2 * x, a, b),
    "rcm_projection": lambda q, k, v, x, a, b, w: rcmlib.rcm_projection(
        x, w, w[0], x, a, b
    ),
    "gated_projection": lambda q, k, v, x, a, b, w: rcmlib.gated_projection(
        x, w, None, x, x
    ),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("numbers", [True, False], ids=["numbers", "per sample"])
def test_a_repeated_call_computes_with_its_own_numbers(
    function, dtype, numbers, device
):
    def result(seed):
        q, k, v, x, a, b, w = arguments(device, dtype, seed)
        if numbers:
            a, b = 0.5 + seed, 0.25
        with Seen():  # takes the long way
            expected = function(q, k, v, x, a, b, w)
        return function(q, k, v, x, a, b, w), expected

    for seed in (0, 1, 2):
        out, expected = result(seed)
        assert torch.equal(out, expected)


@every_function
def test_a_repeated_call_goes_past_the_checks_to_its_plan(
    function, device, monkeypatch
):
    inputs = arguments(device)
    expected = function(*inputs)
    monkeypatch.setattr(checks, "tensor", None)  # cannot be called
    with pytest.raises(TypeError, match="NoneType"):
        function(*(t[:1] for t in inputs))  # another layout, which has to be checked
    assert torch.equal(function(*inputs), expected)


@every_function
def test_whoever_wants_to_see_a_repeated_call_does(function, device):
    inputs = arguments(device)
    expected = [function(*inputs) for _ in range(2)][1]
    with Seen() as seen:
        function(*inputs)
    assert len(seen.names) == 1
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = function(*(mode.from_tensor(t) for t in inputs))
    assert type(fake) is not torch.Tensor and fake.shape == expected.shape
    for t in inputs:
        t.requires_grad_()
    if function is FUNCTIONS["rcm_sage_attention"]:
        with pytest.raises(RuntimeError, match="no gradients"):
            function(*inputs)
    else:
        assert function(*inputs).requires_grad
    with torch.no_grad():
        assert torch.equal(function(*inputs), expected)
    with torch.inference_mode():
        assert torch.equal(function(*inputs), expected)


@every_function
def test_a_repeated_call_on_the_meta_device_launches_nothing(function):
    inputs = [t.to("meta") for t in arguments("cpu")]
    for _ in range(2):
        assert function(*inputs).is_meta


@pytest.mark.parametrize(
    "function", [FUNCTIONS["rcm_skip"], FUNCTIONS["rcm_attention"]]
)
def test_a_repeated_call_inside_a_transform_is_transformed(function, device):
    q, k, v, x, *rest = arguments(device)
    expected = [function(q, k, v, x, *rest) for _ in range(2)][1]
    two = torch.func.vmap(lambda x: function(q, k, v, x, *rest))(torch.stack([x, x]))
    assert torch.equal(two, torch.stack([expected, expected]))
    dx = torch.func.grad(lambda x: function(q, k, v, x, *rest).sum())(x)
    assert dx.abs().sum() > 0
    negative = torch._neg_view(-x)
    assert negative.is_neg()
    assert torch.equal(function(q, k, v, negative, *rest), expected)
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = function(q, k, v, x, *rest)
    assert cast.dtype == torch.float32
    with profile() as trace:
        function(q, k, v, x, *rest)
    assert any(e.key.startswith("rcmlib::") for e in trace.key_averages())


@both_attentions
@pytest.mark.parametrize(("name", "change", "error", "message"), CASES)
def test_bad_input_is_refused_after_good_input_too(
    function, name, change, error, message, device
):
    inputs = good(device) | {"scale": 1.0, "is_causal": True}
    for _ in range(2):
        function(**inputs)
    inputs[name] = change(inputs[name])
    with pytest.raises(error, match=message):
        function(**inputs)


def test_numbers_that_only_equal_a_flag_or_a_scale_are_still_refused(device):
    inputs = good(device) | {"scale": 1.0, "is_causal": True, "c_skip": 1.0}
    for _ in range(2):
        rcmlib.rcm_attention(**inputs)
    for wrong in ({"is_causal": 1}, {"scale": True}, {"c_skip": True}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            rcmlib.rcm_attention(**inputs | wrong)


def test_one_function_does_not_repeat_the_calls_of_another(device):
    q, k, v, x, _, _, w = arguments(device)
    for _ in range(2):
        attention(q, k, v)
        sage_attention(q, k, v)
        rcmlib.gated_projection(x, w, None, x, x)
    for function in (rcmlib.rcm_attention, rcmlib.rcm_sage_attention):
        with pytest.raises(TypeError, match="x must be"):
            function(q, k, v, None, None, None)
    with pytest.raises(ValueError, match="c_out must be"):
        rcmlib.rcm_projection(x, w, None, x, 1.0, x)


@every_function
def test_a_compiled_graph_does_not_depend_on_what_was_called_before(function, device):
    inputs = arguments(device)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    expected = compiled(*inputs)
    function(*inputs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(*inputs), expected)
