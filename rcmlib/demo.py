"""python -m rcmlib.demo: a minute's tour of the fused kernel on whatever this machine has."""

import os
import sys

import torch

import rcmlib
from rcmlib import reference
from rcmlib.measure import ledger, timing
from rcmlib.measure.implementations import IMPLEMENTATIONS, Inputs, implementation

SHOWN = ("flash_eager", "flash_compiled", "cudnn_compiled", "fused")


def main() -> None:
    gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if gpu else "the CPU, through Triton's interpreter"
    device = "cuda" if gpu else "cpu"
    batch, heads, tokens, dim = (4, 12, 2048, 64) if gpu else (2, 2, 192, 64)
    print(f"out = c_skip * x + c_out * attention(q, k, v) on {where}")
    print(f"B={batch} H={heads} N={tokens} D={dim}, bfloat16, a noise level a sample\n")

    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, heads, tokens, dim, device=device).bfloat16()
    x = torch.randn(batch, tokens, heads * dim, device=device).bfloat16()
    c = rcmlib.edm(torch.linspace(0, 2, batch, device=device))
    inputs = Inputs(q, k, v, x, c.c_skip, c.c_out)
    out = rcmlib.rcm_attention(*inputs)
    error = reference.relative_l2(out, reference.rcm_attention(*inputs))
    print(f"relative error against float64      {error:.2e}  (bfloat16 rounds at 2e-03)")
    print(f"sample 0 has t = 0: equals x        {torch.equal(out[0], x[0])}")

    print("\nbytes through HBM, by the ledger (caches ignored)")
    for label in SHOWN:
        megabytes = ledger.total(ledger.pipeline(label, batch, heads, tokens, dim)) / 1e6
        print(f"  {IMPLEMENTATIONS[label].title:<32}  {megabytes:8.1f} MB")

    times = timing.compare({n: implementation(n, inputs) for n in SHOWN}) if gpu else {}
    print("\ntimes" if gpu else "\ntimes: take a GPU, or see ours in the book's chapter 14")
    for label, found in times.items():
        print(f"  {IMPLEMENTATIONS[label].title:<32}  {found.median_ms:8.3f} ms")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
