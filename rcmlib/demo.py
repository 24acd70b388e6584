"""python -m rcmlib.demo: a minute's tour of the fused kernel on whatever this machine has."""

import torch

import rcmlib
from rcmlib import reference
from rcmlib.measure import ledger, records, timing


def main() -> None:
    gpu = torch.cuda.is_available()
    device, tokens = ("cuda", 2048) if gpu else ("cpu", 192)
    where = torch.cuda.get_device_name() if gpu else "the CPU, through Triton's interpreter"
    batch, heads, dim = (4, 12, 64) if gpu else (2, 2, 64)
    print(f"out = c_skip·x + c_out·attention(q, k, v) on {where}")
    print(f"B={batch} H={heads} N={tokens} D={dim}, bfloat16, one noise level a sample\n")

    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, heads, tokens, dim, device=device).bfloat16().unbind(0)
    x = torch.randn(batch, tokens, heads * dim, device=device).bfloat16()
    t = torch.linspace(0, 2, batch, device=device)
    c_skip, c_out, *_ = rcmlib.edm(t)
    out = rcmlib.rcm_attention(q, k, v, x, c_skip, c_out)

    error = reference.relative_l2(out, reference.rcm_attention(q, k, v, x, c_skip, c_out))
    print(f"relative error against float64      {error:.2e}  (bfloat16 rounds at 2e-03)")
    print(f"sample 0 has t = 0: equals x        {torch.equal(out[0], x[0])}")

    moved = {
        name: ledger.total(pipeline(batch, tokens, heads * dim)) / 1e6
        for name, pipeline in (
            ("attention, then PyTorch's skip", ledger.two_pass_eager),
            ("attention, then one skip kernel", ledger.two_pass_compiled),
            ("fused", ledger.fused),
        )
    }
    print("\nbytes through HBM, by the ledger (caches ignored)")
    for name, megabytes in moved.items():
        print(f"  {name:<32}  {megabytes:8.1f} MB")

    print("\ntimes")
    if gpu:
        from rcmlib.measure.implementations import attention_pipelines

        pipelines = attention_pipelines(q, k, v, x, c_skip, c_out)
        chosen = ("flash_eager", "flash_compiled", "cudnn_compiled", "fused")
        measured = timing.compare({name: pipelines[name] for name in chosen})
        for name, result in measured.items():
            print(f"  {name:<32}  {result.median_ms:8.3f} ms")
    else:
        stored = records.case("attention", "seed")
        shape = " ".join(f"{name}={stored[name]}" for name in "BHND")
        print(f"  not here: the interpreter's times mean nothing. Stored, {shape}:")
        for name, result in stored["results"].items():
            print(f"  {name:<32}  {result['median_ms']:8.3f} ms")
        print(f"  on {records.machine()}")


if __name__ == "__main__":
    main()
