"""Random calls of every public function, each decided by (seed, index) alone."""

import torch

import rcmlib
from tests.random_calls.call import Call
from tests.random_calls.draws import Draw
from tests.random_calls.modules import coefficients_call, layer_call, wan_call
from tests.random_calls.operations import (
    attention_call,
    gated_call,
    projection_call,
    rcm_attention_call,
    rcm_sage_call,
    sage_call,
    skip_call,
)

FUNCTIONS = {  # how a call is drawn, and the share of such calls
    "rcm_skip": (skip_call, 12),
    "attention": (attention_call, 12),
    "rcm_attention": (rcm_attention_call, 20),
    "rcm_projection": (projection_call, 12),
    "gated_projection": (gated_call, 12),
    "sage_attention": (sage_call, 7),
    "rcm_sage_attention": (rcm_sage_call, 10),
    "BaselineRCMAttention": (layer_call(rcmlib.BaselineRCMAttention, naive=True), 2),
    "FusedRCMAttention": (layer_call(rcmlib.FusedRCMAttention), 2),
    "TritonFusedRCMAttention": (layer_call(rcmlib.TritonFusedRCMAttention), 6),
    "fuse(WanBlock)": (wan_call, 4),
    "coefficients": (coefficients_call, 1),
}


SHARES = {name: share for name, (_, share) in FUNCTIONS.items()}


def kind_of(seed: int, index: int) -> tuple[str, int]:
    """The function, and which of its kinds: calls of one kind share their kernels."""
    draw = Draw(seed, index, torch.device("cpu"), SHARES)
    return draw.name, draw.number


def draw_call(seed: int, index: int, device: torch.device) -> Call:
    """Call number `index` of a seed. On a CPU it is another, and smaller, than on a GPU."""
    draw = Draw(seed, index, device, SHARES)
    mode = draw.call.choice(("grad", "grad", "grad", "no_grad", "inference_mode"))
    # Tensors made in inference mode are of a kind of their own.
    inside = mode == "inference_mode" and draw.call.random() < 0.5
    with torch.inference_mode(inside):
        call = FUNCTIONS[draw.name][0](draw)
    call.name, call.mode = draw.name, mode
    if "sage" not in draw.name or mode == "no_grad":
        floating = [n for n, v in call.inputs.items() if torch.is_tensor(v)]
        floating = [n for n in floating if n not in call.constant]
        share = draw.kind.randint(0, 1) if call.together else 0.5
        call.wanted = tuple(n for n in floating if draw.kind.random() < share)
    if inside:
        call.wanted = ()
    call.autocast = draw.autocast
    call.precision = call.precision or draw.autocast or draw.dtype
    call.at_zero = draw.at_zero
    # The gradients of PyTorch's own attention are not the same each time.
    ours = draw.name not in ("BaselineRCMAttention", "FusedRCMAttention")
    call.again = ours and draw.call.random() < 0.25
    call.g = draw.kind.choice(("contiguous", "contiguous", "transposed", "one number"))
    return call
