"""python -m rcmlib.demo: a minute's tour of the fused kernel on whatever this machine has."""

import torch

import rcmlib
from rcmlib import reference
from rcmlib.measure import ledger, timing
from rcmlib.measure.implementations import IMPLEMENTATIONS, Inputs, implementation

PASSES = {
    "attention, then PyTorch's skip": ledger.two_pass_eager,
    "attention, then one skip kernel": ledger.two_pass_compiled,
    "fused": ledger.fused,
}
TIMED = ("flash_eager", "flash_compiled", "cudnn_compiled", "fused")


def main() -> None:
    gpu = torch.cuda.is_available()
    where = (
        torch.cuda.get_device_name() if gpu else "the CPU, through Triton's interpreter"
    )
    device = "cuda" if gpu else "cpu"
    batch, heads, tokens, dim = (4, 12, 2048, 64) if gpu else (2, 2, 192, 64)
    print(f"out = c_skip·x + c_out·attention(q, k, v) on {where}")
    print(f"B={batch} H={heads} N={tokens} D={dim}, bfloat16, a noise level a sample\n")

    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, heads, tokens, dim, device=device).bfloat16()
    x = torch.randn(batch, tokens, heads * dim, device=device).bfloat16()
    c = rcmlib.edm(torch.linspace(0, 2, batch, device=device))
    inputs = Inputs(q, k, v, x, c.c_skip, c.c_out)
    out = rcmlib.rcm_attention(*inputs)
    error = reference.relative_l2(out, reference.rcm_attention(*inputs))
    print(
        f"relative error against float64      {error:.2e}  (bfloat16 rounds at 2e-03)"
    )
    print(f"sample 0 has t = 0: equals x        {torch.equal(out[0], x[0])}")

    print("\nbytes through HBM, by the ledger (caches ignored)")
    for name, passes in PASSES.items():
        megabytes = ledger.total(passes(batch, tokens, heads * dim)) / 1e6
        print(f"  {name:<32}  {megabytes:8.1f} MB")

    print("\ntimes")
    if not gpu:
        print("  take a GPU: the interpreter's mean nothing. The book's chapter 13,")
        print("  How fast, against whom, and where it stops paying, shows an H100's.")
        return
    runs = {label: implementation(label, inputs) for label in TIMED}
    for label, found in timing.compare(runs).items():
        print(f"  {IMPLEMENTATIONS[label].title:<32}  {found.median_ms:8.3f} ms")


if __name__ == "__main__":
    main()
