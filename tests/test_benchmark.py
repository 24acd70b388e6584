"""The benchmark around its clock: what it runs, refuses, prints, keeps and compares.

Without a GPU the clock is a fake; the machinery is the real one.
"""

import argparse
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import rcmlib
from benchmarks import __main__ as program
from benchmarks import host, provenance, records, regression, run_suites, traffic
from benchmarks.provenance import as_text
from benchmarks.suites import SUITES, blocks, training
from benchmarks.suites.suite import Suite
from rcmlib import reference
from rcmlib.measure import benchmark, implementations, timing
from rcmlib.measure.benchmark import table
from rcmlib.measure.implementations import IMPLEMENTATIONS
from rcmlib.sage import PV
from tests.inputs import without_a_gpu


def result(median, around=(0.0,) * 5):
    times = sorted(median + d for d in around)
    return timing.summary(times)._asdict()


def case(name="N1024", failed=None, **medians):
    results = {label: result(median) for label, median in medians.items()}
    return {"name": name, "B": 4, "N": 1024, "failed": failed or {}, "results": results}


# ---- how many samples, and which ----


@pytest.mark.parametrize(
    ("call_ms", "count"), [(0.01, 60), (13, 60), (46.9, 20), (99, 9), (400, 5)]
)
def test_samples_fit_a_second_between_5_and_60(call_ms, count):
    assert timing.sample_count(call_ms, 60) == count
    overhead = timing.OVERHEAD_MS * count
    assert count == 5 or count * call_ms + overhead <= timing.BUDGET_MS


def test_a_caller_who_asks_for_few_samples_gets_no_more():
    assert timing.sample_count(0.01, 10) == 10
    assert timing.sample_count(500.0, 3) == 3


def test_a_caller_who_asks_for_more_samples_gets_them_however_long_they_take():
    assert timing.sample_count(400, 60, least=40) == 40
    assert timing.sample_count(0.01, 60, least=40) == 60


def test_a_summary_keeps_every_sample_and_stays_between_them():
    times = [1.0, 1.0, 1.000004, 1.2, 9.0]
    summary = timing.summary(times)
    assert summary.all_ms == [1.0, 1.0, 1.0, 1.2, 9.0] and summary.samples == 5
    assert 1.0 <= summary.p10_ms <= summary.median_ms <= summary.p90_ms <= 9.0


class FakeClock:
    """Calls a function and says that it took what its result says."""

    def samples(self, fn, repeats):
        return [float(fn()) for _ in range(repeats)]


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(timing, "Clock", FakeClock)
    monkeypatch.setattr(timing, "peak_bytes", lambda fn: 1_000_000)


def test_functions_are_timed_in_turn_and_slow_ones_less_often(clock):
    order = []

    def function(name, ms):
        return lambda: order.append(name) or ms

    times = timing.compare({"fast": function("fast", 1), "slow": function("slow", 400)})
    assert (times["fast"].samples, times["slow"].samples) == (60, 5)
    assert times["slow"].median_ms == 400
    assert order.index("slow", 10) < len(order) - order[::-1].index("fast") - 1


@pytest.mark.parametrize("repeats, shares", [(1, [1] * 6), (2, [2] * 6)])
def test_samples_are_shared_out_over_the_rounds(repeats, shares, clock, monkeypatch):
    asked = []
    monkeypatch.setattr(timing, "sample_count", lambda took, most, least: most - 1)

    def samples(self, fn, count):
        asked.append(count)
        return [1.0] * count

    monkeypatch.setattr(FakeClock, "samples", samples)
    timing.compare({"one": lambda: None}, repeats=repeats)
    *_, last = shares
    assert asked[2:] == [*shares[:-1], last - 1]  # the first two are the warm-up


def test_a_function_that_fails_while_it_is_timed_lets_the_others_go_on(clock):
    calls = iter(range(100))

    def tired():
        if next(calls) > 20:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 412.00 GiB. GPU 0 has …"
            )
        return 1.0

    failed = {}
    times = timing.compare({"tired": tired, "fresh": lambda: 2.0}, failed=failed)
    assert list(times) == ["fresh"] and times["fresh"].samples == 60
    assert failed == {"tired": "out of memory: tried to allocate 412.00 GiB"}
    with pytest.raises(StopIteration):  # without `failed`, the error itself
        timing.compare({"broken": lambda: next(iter(()))})


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("no room"), "out of memory"),
        (
            RuntimeError("No available kernel. Aborting execution."),
            "No available kernel",
        ),
        (ValueError("D must be 64\nat line 3"), "D must be 64"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_failure_has_one_short_sentence(error, sentence):
    assert timing.reason(error) == sentence


# ---- one case ----


@pytest.fixture
def on_the_cpu(monkeypatch, clock):
    """benchmark_shape on CPU inputs, with these implementations."""

    def inputs(batch, heads, tokens, dim, dtype, seed):
        random = torch.Generator().manual_seed(seed)
        q, k, v = torch.randn(3, batch, heads, tokens, dim, generator=random).to(dtype)
        x = torch.randn(batch, tokens, heads * dim, generator=random).to(dtype)
        c = rcmlib.edm(torch.rand(batch, generator=random))
        return implementations.Inputs(q, k, v, x, c.c_skip, c.c_out)

    build = implementations.implementation

    def implementation(label, inputs):
        if label == "flash":
            raise RuntimeError("flash is not supported here. Sorry.")
        if label == "cudnn":
            raise torch.OutOfMemoryError("Tried to allocate 7.00 GiB")
        run = build(label, inputs)
        return (lambda: run() * 1.5) if label == "fused_pytorch" else run

    monkeypatch.setattr(implementations, "attention_inputs", inputs)
    monkeypatch.setattr(implementations, "implementation", implementation)
    monkeypatch.setattr(FakeClock, "samples", lambda self, fn, n: [fn() is None] * n)


@without_a_gpu  # ours refuses CPU tensors where Triton compiles
def test_what_is_wrong_or_fails_is_named_with_its_reason_and_the_rest_is_timed(
    on_the_cpu,
):
    labels = ["naive", "flash", "cudnn", "fused_pytorch", "fused"]
    found = benchmark.benchmark_shape("small", (2, 2, 64, 32), labels)
    assert list(found["results"]) == ["naive", "fused"]
    assert found["failed"]["flash"] == "flash is not supported here"
    assert found["failed"]["cudnn"] == "out of memory: tried to allocate 7.00 GiB"
    assert found["failed"]["fused_pytorch"].startswith("wrong: relative error 0.")
    assert found["errors"]["fused"]["relative_l2"] < 0.01
    assert found["peak_bytes"] == {"naive": 1_000_000, "fused": 1_000_000}
    assert (found["B"], found["H"], found["N"], found["D"]) == (2, 2, 64, 32)
    assert found["flop"] == 4 * 2 * 2 * 64**2 * 32 and found["seed"] == 0
    assert json.loads(as_text(found)) == found


def test_where_not_even_the_inputs_fit_everything_has_failed(monkeypatch):
    def inputs(*_):
        raise torch.OutOfMemoryError("Tried to allocate 99.00 GiB")

    monkeypatch.setattr(implementations, "attention_inputs", inputs)
    found = benchmark.benchmark_shape("huge", (1, 1, 1, 16), ["naive", "fused"])
    assert found["results"] == {} and list(found["failed"]) == ["naive", "fused"]
    assert "99.00 GiB" in found["failed"]["fused"]
    assert "not timed: inputs: out of memory" in table(found)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1, 64, 100, 3), {}, ValueError, "C must be a multiple of num_heads, got 100"),
        ((1, 64, 32, 4), {}, ValueError, "from 16 to 256, got 8"),
        ((1, 64, 514, 2), {}, ValueError, "from 16 to 256, got 257"),
        ((0, 64, 64, 1), {}, ValueError, "B must be at least 1, got 0"),
        ((1, 64.0, 64, 1), {}, TypeError, "N must be an int, got float"),
        ((1, 64, 64, True), {}, TypeError, "num_heads must be an int, got bool"),
        ((1, 64, 64, 1), {"dtype": torch.int8}, TypeError, "dtype must be one of"),
        (
            (1, 64, 64, 1),
            {"implementations": ["fused", "fast"]},
            ValueError,
            "; got fast",
        ),
        ((1, 64, 64, 1), {"implementations": "fused"}, TypeError, "a list of labels"),
        ((1, 64, 64, 1), {"implementations": []}, ValueError, "at least one"),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        rcmlib.benchmark_all_implementations(*arguments, **options)


@without_a_gpu
def test_without_a_gpu_the_function_says_so():
    with pytest.raises(RuntimeError, match="a CUDA device, and there is none here"):
        rcmlib.benchmark_all_implementations(1, 64, 64, 1)
    for clock in (host.host_time, lambda fn: host.wall({"fn": fn})):
        with pytest.raises(RuntimeError, match="a CUDA device"):
            clock(lambda: None)


def test_importing_rcmlib_brings_neither_the_kernels_nor_the_benchmark():
    code = (
        "import sys, rcmlib; kernels = 'rcmlib.attention.forward'; print(kernels in "
        "sys.modules, 'rcmlib.measure' in sys.modules); "
        "rcmlib.benchmark_all_implementations; print(kernels in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"] * 3, done.stderr


# ---- what is printed ----


def test_the_table_compares_with_the_faster_two_pass():
    shown = table(
        case(flash_compiled=2.0, cudnn_compiled=1.0, fused=0.8, failed={"naive": "no"})
    )
    lines = shown.split("\n")
    assert lines[0] == "N1024: B=4 N=1024"
    assert lines[1].split() == ["median", "ms", "×", "two-pass", "[95", "%]"]
    assert lines[2].split() == ["flash_compiled", "2.0000", "0.50", "[0.50,", "0.50]"]
    assert lines[3].split() == ["cudnn_compiled", "1.0000", "1"]
    assert lines[4].split() == ["fused", "0.8000", "1.25", "[1.25,", "1.25]"]
    assert lines[5].split() == ["naive", "not", "timed:", "no"]


def test_the_table_shows_how_sure_a_ratio_is():
    one = case(cudnn_compiled=1.0)
    one["results"]["fused"] = result(0.8, around=(-0.3, -0.05, 0, 0.05, 0.2))
    assert "1.25 [1.00, 2.00]" in table(one)  # of five samples, the whole range


def test_the_table_shows_rates_and_memory_where_they_are_known():
    one = case(fused=2.0) | {"flop": 4e12, "peak_bytes": {"fused": 12_500_000}}
    lines = table(one).split("\n")
    assert lines[1].split() == ["median", "ms", "TFLOP/s", "peak", "MB"]
    assert lines[2].split() == ["fused", "2.0000", "2000", "12.5"]


def test_every_stored_record_can_be_shown():
    for name in records.names():
        for one in records.record(name)["cases"]:
            assert one["name"] in table(one)


# ---- against a baseline ----


def verdicts(now, before, **options):
    rows = regression.compare(now, before, "cudnn_compiled", **options)
    return {row.label: row.verdict for row in rows}, rows


def test_ratios_move_only_where_their_whole_interval_does():
    before = [case(cudnn_compiled=1.0, a=1.0, b=1.0, c=1.0)]
    # The machine is half as fast, which changes no ratio; b and c have moved.
    now = [case(cudnn_compiled=2.0, a=2.08, b=2.2, c=1.8)]
    found, rows = verdicts(now, before)
    assert found == {"a": "same", "b": "slower", "c": "faster"}
    assert not regression.passes(rows)
    assert "slower: N1024 b 1.000 -> 0.909 of cudnn_compiled's speed, -9.1%" in (
        regression.report(rows)
    )
    noisy = [case(cudnn_compiled=2.0, b=2.2)]
    noisy[0]["results"]["b"] = result(2.2, around=(-0.2, -0.15, 0, 0.1, 0.3))
    found, rows = verdicts(noisy, [case(cudnn_compiled=1.0, b=1.0)])
    assert found == {"b": "same"} and regression.passes(rows)


def test_what_is_missing_is_named_and_what_fails_now_is_a_loss():
    before = [
        case(cudnn_compiled=1.0, a=1.0, b=1.0, c=1.0),
        case("gone", cudnn_compiled=1.0),
    ]
    now = [case(cudnn_compiled=1.0, a=1.0, failed={"b": "out of memory"})]
    found, rows = verdicts(now, before)
    assert found == {
        "a": "same",
        "b": "fails now",
        "c": "not measured",
        "": "not measured",
    }
    assert not regression.passes(rows)
    rows = [row for row in rows if row.label != "b"]
    assert regression.passes(rows)


def test_a_record_that_kept_no_samples_is_compared_with_nothing():
    old = case(cudnn_compiled=1.0, a=1.0)
    del old["results"]["a"]["all_ms"]
    found, rows = verdicts([case(cudnn_compiled=1.0, a=2.0)], [old])
    assert found == {"a": "no samples"} and not regression.passes(rows)


def test_a_check_that_compares_nothing_does_not_pass():
    found, rows = verdicts([case(a=1.0)], [case(a=1.0)])
    assert found == {"cudnn_compiled": "no reference"}
    assert not regression.passes(rows)
    assert not regression.passes([])


def test_a_stored_record_has_not_moved_against_itself():
    cases = records.record("attention")["cases"]
    assert regression.passes(regression.compare(cases, cases, "cudnn_compiled"))


# ---- the command ----


def options(**given):
    defaults = {"out": None, "baselines": {}, "reference": None, "tolerance": 0.05}
    return argparse.Namespace(**defaults | given)


@pytest.fixture
def a_machine(monkeypatch):
    monkeypatch.setattr(provenance, "provenance", lambda: {"device": "a GPU"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def suite_of(*cases):
    def measure(one):
        if isinstance(one, BaseException):
            raise one
        yield one

    return Suite("what", "how.", measure, [(one,) for one in cases])


def test_ctrl_c_keeps_the_cases_that_are_done(a_machine, tmp_path, capsys):
    (tmp_path / "test.json").write_text("the record before")
    interrupted = suite_of(case("one", fused=1.0), KeyboardInterrupt(), case("three"))
    status = run_suites.run_suite("test", interrupted, options(out=tmp_path), None)
    assert status == 130
    assert "interrupted after 1 case(s); stored: " in capsys.readouterr().out
    kept = json.loads((tmp_path / "test.json.partial").read_text())
    assert [one["name"] for one in kept["cases"]] == ["one"]
    assert (tmp_path / "test.json").read_text() == "the record before"


def test_an_error_in_a_case_keeps_the_others_too(a_machine, tmp_path):
    broken = suite_of(case("one", fused=1.0), RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        run_suites.run_suite("test", broken, options(out=tmp_path), None)
    assert (tmp_path / "test.json.partial").exists()


def test_a_suite_is_stored_and_compared(a_machine, tmp_path, capsys):
    before = {
        "provenance": {"device": "another GPU"},
        "cases": [case(cudnn_compiled=1.0, fused=1.0)],
    }
    for median, status in ((1.0, 0), (1.3, 1)):
        suite = suite_of(case(cudnn_compiled=1.0, fused=median))
        out = tmp_path / "mine.json"
        assert run_suites.run_suite("test", suite, options(out=out), before) == status
        stored = json.loads(out.read_text())
        assert stored["name"] == "test" and stored["method"].endswith(" how.")
        assert stored["cases"][0]["results"]["fused"]["all_ms"] == [median] * 5
    shown = capsys.readouterr().out
    assert "another GPU" in shown and "slower: N1024 fused" in shown


def test_lists_of_numbers_take_one_line_of_a_record():
    content = {"a": [1.5, 2, -3e-05], "b": ["x"], "c": [], "d": {"e": [[1], [2]]}}
    text = as_text(content)
    assert '"a": [1.5,2,-3e-05]' in text and json.loads(text) == content


def command(*arguments):
    parts = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(parts, capture_output=True, text=True)


@without_a_gpu
def test_without_a_gpu_the_stored_record_is_shown():
    done = command("suites", "attention")
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith("There is no CUDA device here, so nothing can be")
    machine = records.machine("attention")
    assert machine in done.stdout and "cudnn_compiled" in done.stdout


@without_a_gpu
def test_without_a_gpu_there_is_nothing_to_check():
    done = command("suites", "attention", "--baseline")
    assert done.returncode == 1 and "a baseline needs one" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "no suite 'nope'; there are: ceilings, skip, attention"),
        (["--shape", "1,2,3"], "--shape must be four numbers B,N,C,HEADS, got '1,2,3'"),
        (["--shape", "1,64,100,3"], "C must be a multiple of num_heads"),
        (["seed", "--shape", "1,64,64,1"], "not both"),
        (["seed", "wan", "--out", "x.json"], "x.json is one record"),
        (["seed", "--baseline", "nope"], "no record 'nope'; there are:"),
        (["seed", "--baseline", "nope.json"], "No such file"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run_suites.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_every_suite_is_named_in_the_help():
    for name in SUITES:
        assert name in run_suites.__doc__, name


def test_two_records_are_compared_by_the_command(tmp_path, capsys):
    paths = []
    for device, fused in (("one", 1.0), ("another", 1.3)):
        cases = [case(cudnn_compiled=1.0, fused=fused)]
        content = {"name": "mine", "provenance": {"device": device}, "cases": cases}
        paths.append(tmp_path / f"{device}.json")
        paths[-1].write_text(json.dumps(content))
    before, now = map(str, paths)
    for arguments, status in (([before, before], 0), ([now, before], 1)):
        with pytest.raises(SystemExit) as stop:
            regression.main(arguments)
        assert stop.value.code == status
    shown = capsys.readouterr().out
    assert "another GPU: one" in shown and "slower: N1024 fused" in shown
    with pytest.raises(SystemExit) as stop:
        regression.main(["nope", before])
    assert stop.value.code == 2


@pytest.mark.parametrize("name", program.COMMANDS)
def test_every_command_is_named_in_the_help_and_has_its_own(name):
    assert name in program.__doc__
    done = command(name, "--help")
    assert done.returncode == 0 and f"python -m benchmarks {name}" in done.stdout


def test_an_unknown_command_lists_those_that_exist():
    done = command("nope")
    assert (
        done.returncode == 2 and "no command 'nope'; there are: suites" in done.stderr
    )


# ---- one row an implementation ----

# Suites that compare implementations of the table; others time parts, layers or blocks.
COMPARISONS = (
    "attention", "one_over_n", "sage", "sage_crossover", "quick", "seed", "video", "wan",
    "scaling", "batch", "dims",
)  # fmt: skip


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_s_labels_are_in_the_table(name):
    for _, shape, labels in SUITES[name].each:
        assert len(shape) == 4 and set(labels) <= IMPLEMENTATIONS.keys()
    if name in records.names():
        for one in records.record(name)["cases"]:
            assert one["results"].keys() <= IMPLEMENTATIONS.keys()


def test_the_labels_of_training_and_of_traffic_are_in_the_table():
    assert set(training.TRAINED) <= IMPLEMENTATIONS.keys()
    always = {n for n in training.TRAINED if IMPLEMENTATIONS[n].package is None}
    for one in records.record("gradients")["cases"]:
        assert always <= one["results"].keys()
    counted = {label for shape in traffic.SHAPES for label in traffic.labels(shape)}
    for one in records.record("traffic")["cases"]:
        counted |= one["traffic"].keys()
    assert counted - IMPLEMENTATIONS.keys() == {"negate"}


def test_addmm_in_place_is_the_projection_with_its_skip():
    a, weight, bias, x = (
        torch.randn(*shape) for shape in ((1, 5, 4), (3, 4), (3,), (1, 5, 3))
    )
    before, c = x.clone(), torch.tensor([[0.3], [0.8]], dtype=torch.float64)
    out = blocks.addmm_in_place(a, weight, bias, x, *c)()
    ref = reference.rcm_projection(a, weight, bias, x, *c)
    assert reference.relative_l2(out, ref) < 1e-6 and torch.equal(x, before)


def test_what_is_not_installed_is_left_out(monkeypatch):
    """By the name that pip knows it by: FlashAttention-2 has flash_attn, too."""
    found = SimpleNamespace(name="flash-attn"), SimpleNamespace(name="sageattention")
    monkeypatch.setattr(
        implementations.importlib.metadata,
        "distributions",
        lambda name: (d for d in found if d.name == name),
    )
    wanted = ["cudnn", "fa4", "fa4_compiled", "sage1_compiled", "fused"]
    assert implementations.installed(wanted) == ["cudnn", "sage1_compiled", "fused"]


def test_every_row_of_the_table_is_whole():
    for label, row in IMPLEMENTATIONS.items():
        assert row.label == label and callable(row.build)
        assert re.fullmatch("#[0-9A-F]{6}", row.colour)
        assert set(row.products) <= {"bf16", "int8", "fp8"}
    titles = [row.title for row in IMPLEMENTATIONS.values()]
    assert len(set(titles)) == len(titles)
    assert {f"sage_kernel_{pv}" for pv in PV} <= IMPLEMENTATIONS.keys()


# ---- on a GPU ----


@pytest.mark.gpu
def test_every_implementation_gets_a_time_at_a_small_shape(capsys):
    found = rcmlib.benchmark_all_implementations(2, 512, 256, 4)
    assert not found["failed"]
    for label in implementations.installed(benchmark.PEERS):
        timed = found["results"][label]
        assert 0 < timed["p10_ms"] <= timed["median_ms"] <= timed["p90_ms"], label
        assert timed["samples"] == len(timed["all_ms"]) >= 20
        assert found["peak_bytes"][label] > 0
    assert "× two-pass" in capsys.readouterr().out
    assert json.loads(as_text(found)) == found


@pytest.mark.gpu
def test_what_is_not_supported_is_reported_and_the_rest_goes_on():
    labels = ["flash_compiled", "cudnn_compiled", "fused"]
    found = rcmlib.benchmark_all_implementations(
        1, 256, 128, 2, dtype=torch.float32, implementations=labels
    )
    assert set(found["failed"]) == {"flash_compiled", "cudnn_compiled"}
    assert list(found["results"]) == ["fused"]


@pytest.mark.gpu
def test_a_wrong_implementation_gets_no_time(monkeypatch):
    right = IMPLEMENTATIONS["fused"]

    def wrong(inputs):
        run = right.build(inputs)
        return lambda: run() * 1.1

    monkeypatch.setitem(IMPLEMENTATIONS, "fused", right._replace(build=wrong))
    found = rcmlib.benchmark_all_implementations(
        1, 256, 128, 2, implementations=["triton_skip", "fused"]
    )
    assert list(found["results"]) == ["triton_skip"]
    assert found["failed"]["fused"].startswith("wrong: relative error 0.")


@pytest.mark.gpu
def test_out_of_memory_is_reported_and_the_memory_is_free_again(gpu_memory):
    before = torch.cuda.memory_allocated()
    found = benchmark.benchmark_shape("long", (1, 12, 200_000, 64), ["naive", "fused"])
    assert found["failed"]["naive"].startswith("out of memory: tried to allocate")
    assert found["results"]["fused"]["samples"] >= 5
    timing.free()
    # cuBLAS keeps a workspace; q alone has 307 MB.
    assert torch.cuda.memory_allocated() - before < 64 << 20


@pytest.mark.gpu
def test_a_launch_takes_microseconds():
    x = torch.randn(64, 64, device="cuda")
    assert 0.5 < 1e3 * host.host_time(lambda: x + x).median_ms < 10_000
    assert host.wall({"add": lambda: x + x})["add"].samples == 20
