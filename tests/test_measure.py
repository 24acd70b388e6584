"""The ledger, the records, and what measuring says where it cannot."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import provenance, records
from benchmarks.suites import blocks
from rcmlib.measure import ledger, timing
from rcmlib.measure.records import estimate
from tests.inputs import without_a_gpu

SHAPE = (4, 2048, 768)


@pytest.mark.parametrize(
    ("pipeline", "tensors"),
    [
        (ledger.two_pass_eager, 11),
        (ledger.two_pass_compiled, 7),
        (ledger.fused, 5),
        (ledger.published_two_pass, 11),
        (ledger.published_fused, 8),
        (ledger.honest_fused, 9),
    ],
)
def test_the_ledger_counts_tensors_and_bytes(pipeline, tensors):
    passes = pipeline(*SHAPE)
    assert ledger.tensors(passes) == tensors
    assert ledger.total(passes) == tensors * 4 * 2048 * 768 * 2


def test_the_published_saving_is_27_percent_and_the_honest_one_18():
    before = ledger.total(ledger.published_two_pass(*SHAPE))
    after = ledger.total(ledger.published_fused(*SHAPE))
    honest = ledger.total(ledger.honest_fused(*SHAPE))
    assert 1 - after / before == pytest.approx(0.2727, abs=1e-4)
    assert 1 - honest / before == pytest.approx(0.1818, abs=1e-4)


def test_the_ledger_brings_neither_the_kernels_nor_the_compiler():
    code = (
        "import sys, rcmlib.measure.ledger as l; l.pipeline('fused', 1, 1, 16, 16); "
        "print({'rcmlib.core.epilogue', 'torch._dynamo'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("name", records.names())
def test_a_stored_record_says_where_its_numbers_come_from(name):
    content = records.record(name)
    assert content["name"] == name and content["what"] and content["method"]
    for key in ("device", "driver", "torch", "triton", "cudnn", "commit", "date"):
        assert content["provenance"][key] not in ("", "unknown"), key
    for case in content["cases"]:
        for result in case["results"].values():
            assert 0 < result["p10_ms"] <= result["median_ms"] <= result["p90_ms"]
            # Long calls get half a second of samples at least, and never fewer than five.
            assert result["samples"] >= (20 if result["median_ms"] < 20 else 5)


def test_the_helpers_read_what_the_record_holds():
    results = records.case("attention", "seed")["results"]
    flash, fused = (results[k]["median_ms"] for k in ("flash_eager", "fused"))
    assert records.ratio("attention", "seed", "flash_eager", "fused") == flash / fused
    assert 1000 < records.copy_gb_s() < 10_000
    assert 100 < records.bf16_tflop_s() < 5000
    assert "attention" in records.names()
    assert records.record("attention")["provenance"]["device"] in records.machine()


# ---- how sure a comparison is ----


def test_an_estimate_is_the_first_median_over_the_second():
    slow, fast = [2.0, 2.1, 2.2], [1.0, 1.0, 1.0]
    found = estimate(slow, fast)
    assert found == (2.1, 2.0, 2.2)  # of three samples, the whole range
    assert estimate(fast, slow).value == 1 / 2.1
    assert estimate(slow, fast, of=lambda a, b: a - b).value == pytest.approx(1.1)
    assert estimate([3.0], [2.0], [1.0], of=lambda a, b, c: a * b - c) == (5, 5, 5)


def test_an_estimate_knows_what_it_holds_and_how_it_is_written():
    found = estimate([2.0, 2.1, 2.2], [1.0, 1.0])
    assert 2.0 in found and 2.15 in found and 1.99 not in found and 1 not in found
    assert f"{found:.2f}" == "2.10 [2.00, 2.20]" and f"{found:.0%}"[:4] == "210%"


def test_an_estimate_is_the_same_at_each_call_and_on_each_machine():
    """The digits that NumPy's stream of this seed gives: the book prints some."""
    rng = np.random.default_rng(1)
    slow, fast = 2 + rng.random(60), 1 + rng.random(60)
    first, again = estimate(slow, fast), estimate(slow, fast)
    assert first == again
    assert f"{first:.6f}" == "1.747276 [1.522651, 1.884951]"
    assert estimate(slow.tolist(), fast.tolist()) == first


@pytest.mark.parametrize("count", [5, 20, 60])
def test_an_interval_holds_the_truth_about_19_times_of_20(count):
    rng = np.random.default_rng(0)
    skewed = 1 + 0.02 * rng.exponential(size=(2, 300, count))  # medians equal
    held = sum(1 in estimate(a, b) for a, b in zip(*skewed, strict=True))
    assert 0.92 <= held / 300 <= 0.99
    shifted = sum(1 in estimate(1.5 * a, b) for a, b in zip(*skewed, strict=True))
    assert shifted == 0  # half as slow again is never taken for nothing


def test_more_samples_narrow_an_interval_though_they_scatter_the_same():
    rng = np.random.default_rng(0)
    width = {}
    for count in (25, 2500):
        found = estimate(*(1 + 0.1 * rng.standard_normal((2, count))))
        width[count] = found.high - found.low
    assert 5 < width[25] / width[2500] < 20  # by √100, about


def test_the_records_estimate_what_their_samples_say():
    results = records.case("attention", "seed")["results"]
    slow, fast = (results[n]["all_ms"] for n in ("cudnn_compiled", "fused"))
    names = "attention", "seed", "cudnn_compiled", "fused"
    assert records.estimate(*names) == estimate(slow, fast)
    assert records.estimate(*names).value == pytest.approx(records.ratio(*names))
    saved = records.estimate(*names, of=lambda a, b: a - b)
    assert saved == estimate(slow, fast, of=np.subtract) and 0 not in saved


SAMPLED = sorted({*records.names()} - {"sage_one"})  # which keeps no samples


@pytest.mark.parametrize("name", SAMPLED)
def test_every_stored_median_lies_in_its_own_interval(name):
    for case in records.record(name)["cases"]:
        for result in case["results"].values():
            found = estimate(result["all_ms"], of=lambda median: median)
            assert found.value == pytest.approx(result["median_ms"])
            assert result["median_ms"] in found._replace(
                low=found.low - 1e-9, high=found.high + 1e-9
            )


def test_the_stored_speeds_meet_the_promises():
    """Ratios within one stored run, not times of this machine."""
    ratio = records.ratio
    assert ratio("attention", "seed", "flash_eager", "fused") >= 1.8
    assert records.estimate("attention", "seed", "cudnn_compiled", "fused").low > 1
    for case in ("N1024", "seed", "N4096", "N8192"):
        assert ratio("attention", case, "flash_eager", "fused") >= 1.27


def test_a_missing_record_lists_those_that_exist():
    with pytest.raises(
        FileNotFoundError, match="no record 'nope'; there are: attention"
    ):
        records.record("nope")
    with pytest.raises(KeyError, match="has no case 'nope'"):
        records.case("attention", "nope")


@without_a_gpu
def test_without_a_gpu_nothing_is_timed():
    with pytest.raises(RuntimeError, match="a CUDA device, and there is none"):
        timing.compare({"nothing": lambda: None})


@pytest.mark.gpu
def test_a_record_is_written_with_its_provenance(tmp_path):
    matrix = torch.randn(512, 512, device="cuda")
    times = timing.compare({"product": lambda: matrix @ matrix}, rounds=2, repeats=5)
    assert times["product"].samples == 10
    assert 0 < times["product"].p10_ms <= times["product"].median_ms
    case = {"name": "one", "results": {"product": times["product"]._asdict()}}
    path = provenance.save("test", "a product", "a few runs", [case], tmp_path)
    stored = json.loads(path.read_text())
    assert stored["provenance"]["device"] == torch.cuda.get_device_name()


@pytest.mark.gpu
def test_a_product_of_eight_times_the_size_takes_longer():
    """Sanity of the clock, on any GPU."""
    small, large = (torch.randn(n, n, device="cuda") for n in (1024, 8192))
    times = timing.compare(
        {"small": lambda: small @ small, "large": lambda: large @ large}
    )
    assert times["large"].median_ms > times["small"].median_ms


def test_a_compiled_layer_runs_on_the_backend_that_it_is_timed_for(device):
    """torch.compile's caches do not tell backends apart: the first would serve for both."""
    q = torch.randn(1, 2, 64, 32, device=device, dtype=torch.bfloat16)
    layer = partial(F.scaled_dot_product_attention, q, q, q)
    for backend, fused in (
        (SDPBackend.FLASH_ATTENTION, {"flash"}),
        (SDPBackend.MATH, set()),
    ):
        with blocks.afresh(), sdpa_kernel(backend):
            run = torch.compile(layer, dynamic=False)
            run()
            assert blocks.backends(run) == fused


def test_the_demo_runs_and_its_claims_hold():
    command = [sys.executable, "-m", "rcmlib.demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "sample 0 has t = 0: equals x        True" in done.stdout
    error = float(done.stdout.split("relative error against float64")[1].split()[0])
    assert error < 5e-3
    assert "fused" in done.stdout
