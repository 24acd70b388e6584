"""Bad input: an error that names the argument, what came and what is allowed."""

import subprocess
import sys

import pytest
import torch

import rcmlib
from rcmlib import sage


def good(device):
    q, k, v = torch.randn(3, 2, 2, 5, 16, device=device).unbind(0)
    x = torch.randn(2, 5, 32, device=device)
    return {"q": q, "k": k, "v": v, "x": x, "c_skip": 0.5, "c_out": 0.5}


CASES = [  # the argument, what it becomes, the error, what the message says
    ("q", lambda q: q[0], ValueError, r"q must have 4 dimensions, got 3: \[2, 5, 16\]"),
    ("q", lambda q: q.tolist(), TypeError, "q must be a torch.Tensor, got list"),
    (
        "q",
        lambda q: q.double(),
        TypeError,
        "q must be one of float32, .* got torch.float64",
    ),
    ("q", lambda q: q.int(), TypeError, "q must be one of .* got torch.int32"),
    (
        "q",
        lambda q: q[:, :, :0],
        ValueError,
        r"q must not be empty, got \[2, 2, 0, 16\]",
    ),
    ("k", lambda k: k[:, :, :0], ValueError, "k must not be empty"),
    (
        "k",
        lambda k: k[:, :1],
        ValueError,
        r"k must be \[B, H, Nkv, D\] with q's B, H, D",
    ),
    ("k", lambda k: k[:1], ValueError, r"k must be \[B, H, Nkv, D\]"),
    ("k", lambda k: k[..., :8], ValueError, r"k must be \[B, H, Nkv, D\]"),
    (
        "k",
        lambda k: k.half(),
        TypeError,
        "k must have q's dtype torch.float32, got .*16",
    ),
    ("v", lambda v: v[:, :, :4], ValueError, r"v must have k's shape \[2, 2, 5, 16\]"),
    ("v", lambda v: v.to("meta"), ValueError, "v must be on q's device .*, got meta"),
    (
        "v",
        lambda v: v.mT.contiguous().mT,
        ValueError,
        "v must have a contiguous last dim",
    ),
    (
        "x",
        lambda x: x[:, :4],
        ValueError,
        r"x must be \[B, Nq, H\*D\] = \[2, 5, 32\], got",
    ),
    ("x", lambda x: x.view(2, 5, 2, 16), ValueError, "x must have 3 dimensions, got 4"),
    ("x", lambda x: x.bfloat16(), TypeError, "x must have q's dtype"),
    (
        "x",
        lambda x: x.mT.contiguous().mT,
        ValueError,
        "x must have a contiguous last dim",
    ),
    (
        "c_skip",
        lambda c: torch.ones(3),
        ValueError,
        r"c_skip .* shape \[2\], got \[3\]",
    ),
    ("c_skip", lambda c: torch.ones(2, 1), ValueError, r"c_skip .* shape \[2\], got"),
    (
        "c_out",
        lambda c: torch.ones(2).long(),
        TypeError,
        "c_out must be a floating tensor",
    ),
    (
        "c_out",
        lambda c: "1",
        TypeError,
        "c_out must be a number or a torch.Tensor, got str",
    ),
    ("c_out", lambda c: None, TypeError, "c_out must be a number or a torch.Tensor"),
    (
        "scale",
        lambda _: -1.0,
        ValueError,
        "scale must be positive and finite in float32, got",
    ),
    ("scale", lambda _: float("nan"), ValueError, "scale must be positive and finite"),
    (
        "scale",
        lambda _: 1e-46,
        ValueError,
        "scale must be positive and finite in float32",
    ),
    (
        "scale",
        lambda _: 1e39,
        ValueError,
        "scale must be positive and finite in float32",
    ),
    ("scale", lambda _: "1", TypeError, "scale must be a number or None, got str"),
]


both_attentions = pytest.mark.parametrize(
    "function", [rcmlib.rcm_attention, rcmlib.rcm_sage_attention]
)


@both_attentions
@pytest.mark.parametrize(("name", "change", "error", "message"), CASES)
def test_attention_refuses(function, name, change, error, message, device):
    arguments = good(device)
    arguments[name] = change(arguments.get(name))
    with pytest.raises(error, match=message):
        function(**arguments)


@both_attentions
@pytest.mark.parametrize("dim", [1, 15, 257, 512])
def test_attention_refuses_head_dimensions_it_has_no_tile_for(function, dim, device):
    q, k, v = torch.randn(3, 1, 1, 4, dim, device=device).unbind(0)
    with pytest.raises(ValueError, match=f"head dimension of 16 to 256, got {dim}"):
        function(q, k, v, torch.randn(1, 4, dim, device=device), 0.5, 0.5)


@both_attentions
@pytest.mark.gpu
def test_tensors_on_different_devices_are_refused(function):
    arguments = good("cuda")
    for name in ("k", "x"):
        with pytest.raises(ValueError, match=f"{name} "):
            function(**arguments | {name: arguments[name].cpu()})
    with pytest.raises(ValueError, match="c_skip must be on the inputs' device cuda:0"):
        function(**arguments | {"c_skip": torch.ones(2)})


@pytest.mark.parametrize("pv", ["fp4", "", "FP8", 8, ["fp8"], torch.float8_e4m3fn])
def test_rcm_sage_attention_refuses_number_formats_it_does_not_know(pv, device):
    with pytest.raises(ValueError, match="pv must be None or one of fp8, fp8_fp16, .*"):
        rcmlib.rcm_sage_attention(**good(device), pv=pv)


@pytest.mark.parametrize("pv", ["fp8", "fp8_fp16", "fp8_short"])
def test_rcm_sage_attention_refuses_fp8_on_a_gpu_without_it(pv, monkeypatch):
    class OnGPU:
        is_cuda, device = True, torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(ValueError, match='pv must be "fp16" on a GPU without FP8'):
        sage._check_pv(pv, OnGPU)
    assert sage._check_pv(None, OnGPU) == sage._check_pv("fp16", OnGPU) == "fp16"


@pytest.mark.parametrize("name", ["smooth_q", "smooth_k", "smooth_v"])
@pytest.mark.parametrize("flag", [1, None, "yes", torch.tensor(True)], ids=str)
def test_rcm_sage_attention_refuses_flags_that_are_not_bool(name, flag, device):
    with pytest.raises(TypeError, match=f"{name} must be a bool, got"):
        rcmlib.rcm_sage_attention(**good(device), **{name: flag})


@pytest.mark.parametrize(
    ("x", "f", "error", "message"),
    [
        (
            torch.ones(2, 3),
            torch.ones(2, 4),
            ValueError,
            r"f must have x's shape \[2, 3\]",
        ),
        (torch.ones(2, 3).half(), torch.ones(2, 3), TypeError, "x must have f's dtype"),
        (torch.ones(2, 0), torch.ones(2, 0), ValueError, "x must not be empty"),
        (torch.tensor(1.0), torch.tensor(1.0), ValueError, "x must not be empty"),
        (torch.ones(2, 3).long(), torch.ones(2, 3), TypeError, "x must be one of"),
        (
            torch.ones(2, 6, 8).mT,
            torch.ones(2, 8, 6),
            ValueError,
            r"x must be viewable as \[B, R, C\] with a contiguous last",
        ),
    ],
)
def test_rcm_skip_refuses(x, f, error, message, device):
    with pytest.raises(error, match=message):
        rcmlib.rcm_skip(x.to(device), f.to(device), 0.5, 0.5)


@pytest.mark.parametrize("device", ["mps", "meta", "xpu"])
def test_a_device_that_triton_does_not_serve_is_refused(device):
    with pytest.raises(ValueError, match="q must be on a CUDA device or the CPU, got"):
        rcmlib.core.check_device("q", torch.device(device))


def test_a_first_argument_on_the_meta_device_is_refused_beside_others_elsewhere(device):
    a, x, weight = (
        torch.ones(s, device=device) for s in [(1, 4, 16), (1, 4, 8), (8, 16)]
    )
    with pytest.raises(ValueError, match="weight must be on a's device meta, got"):
        rcmlib.rcm_projection(a.to("meta"), weight, None, x, 0.5, 0.5)


def test_a_gpu_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match="compute capability 8.0 .* or newer, got 7.5"):
        rcmlib.core.check_device("q", torch.device("cuda"))


def test_a_cpu_tensor_is_refused_where_triton_compiles_for_a_gpu():
    code = "import torch, rcmlib; x = torch.ones(2, 3);rcmlib.rcm_skip(x, x, 1.0, 0.0)"
    error = _run(code, TRITON_INTERPRET="0")
    assert "ValueError: x is on the CPU" in error and "TRITON_INTERPRET=1" in error


def test_a_cpu_tensor_is_refused_inside_torch_compile_too():
    code = (
        "import torch, rcmlib; x = torch.ones(2, 3);"
        "torch.compile(rcmlib.rcm_skip, backend='eager')(x, x, 1.0, 0.0)"
    )
    assert "ValueError: x is on the CPU" in _run(code, TRITON_INTERPRET="0")


def test_no_warning_comes_of_an_infinite_f(device, recwarn):
    x = torch.ones(2, 3, device=device)
    assert torch.equal(rcmlib.rcm_skip(x, x * float("inf"), 1.0, 0.0), x)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_without_triton_the_torch_parts_work_and_a_kernel_call_says_what_to_do():
    code = (
        "import importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a);"
        "import torch, rcmlib; x = torch.ones(1, 4, 16);"
        "rcmlib.BaselineRCMAttention(16, 1)(x, 0.5); rcmlib.edm(1.0);"
        "rcmlib.rcm_skip(x, x, 1.0, 0.0)"
    )
    assert "RuntimeError: this operation is a Triton kernel" in _run(code)


@pytest.mark.parametrize(
    "module",
    [
        rcmlib.BaselineRCMAttention,
        rcmlib.FusedRCMAttention,
        rcmlib.TritonFusedRCMAttention,
    ],
)
def test_modules_refuse(module):
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads"):
        module(10, num_heads=3)
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        module(8, num_heads=1, sigma_data=0.0)
    layer = module(8, num_heads=1)
    with pytest.raises(ValueError, match=r"x must be \[B, N, 8\], got \[2, 3, 9\]"):
        layer(torch.ones(2, 3, 9), 0.5)
    with pytest.raises(ValueError, match=r"t must be a number or of shape \[2\]"):
        layer(torch.ones(2, 3, 8), torch.ones(3))
    with pytest.raises(ValueError, match=r"t must be finite and in \[0, inf\], got -1"):
        layer(torch.ones(2, 3, 8), -1.0)
    with pytest.raises(
        TypeError, match="t must be a number or a torch.Tensor, got str"
    ):
        layer(torch.ones(2, 3, 8), "1")


def _run(code: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    return done.stderr
