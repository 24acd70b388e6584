"""The ledger of each implementation, a cache's part in it, and Nsight Compute's answers."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import records, traffic
from benchmarks.traffic import ProfilerError
from rcmlib.measure import ledger
from rcmlib.measure.implementations import IMPLEMENTATIONS
from tests.inputs import without_a_gpu

SEED, LARGE = (4, 12, 2048, 64), (4, 16, 8192, 128)
TENSOR = math.prod(SEED) * 2  # bytes of q, k, v, x or out
SCORES = 4 * 12 * 2048 * 2048 * 2

# ---- the ledger of each implementation ----


@pytest.mark.parametrize(
    ("label", "size"),
    [
        ("negate", 2),
        ("flash", 4),
        ("cudnn", 4),
        ("triton", 4),
        ("flash_eager", 11),
        ("cudnn_eager", 11),
        ("flash_compiled", 7),
        ("cudnn_compiled", 7),
        ("flex_compiled", 7),
        ("triton_skip", 7),
        ("fused", 5),
        # q8, k8 and v8 are half a tensor; q, k and v are read twice, twice and once.
        ("sage", 5 + 1.5 + 3.5),
        ("sage_kernel_fp8", 3.5),
        ("sage1_compiled", 16),
    ],
)
def test_an_implementation_moves_so_many_tensors(label, size):
    assert ledger.total(ledger.pipeline(label, *SEED)) == size * TENSOR


def test_the_naive_one_moves_the_score_matrix_six_times():
    passes = ledger.pipeline("naive", *SEED)
    matrices = [size for p in passes for part in p[1:] for size in part.values()]
    assert matrices.count(SCORES) == 6
    assert ledger.total(passes) == 6 * SCORES + 19 * TENSOR


def test_every_label_of_the_ledger_but_negate_is_an_implementation():
    assert ledger.PIPELINES.keys() - IMPLEMENTATIONS.keys() == {"negate"}


def test_no_pass_reads_what_nobody_wrote():
    for label in ledger.PIPELINES:
        known = set("qkvx")
        if label == "sage_kernel_fp8":  # its copies are made before it is called
            known |= {"q8", "k8", "v8"}
        for step in ledger.pipeline(label, *SEED):
            assert step.reads.keys() <= known, (label, step.name)
            known |= step.writes.keys()


def test_the_five_tensors_of_the_large_shape_are_671_mb():
    assert ledger.total(ledger.pipeline("fused", *LARGE)) == 671_088_640


# ---- a cache ----


@pytest.mark.parametrize("label", ledger.PIPELINES)
def test_no_cache_is_the_same_as_caches_ignored(label):
    passes = ledger.pipeline(label, *SEED)
    assert ledger.hbm(passes, 0).bytes == ledger.total(passes)


@pytest.mark.parametrize("label", ledger.PIPELINES)
def test_an_infinite_cache_reads_each_input_once_and_nothing_of_its_own(label):
    passes = ledger.pipeline(label, *SEED)
    inputs, known = 0, set()
    for step in passes:
        inputs += sum(size for n, size in step.reads.items() if n not in known)
        known |= step.touched.keys()
    found = ledger.hbm(passes, math.inf)
    assert found.read == inputs
    assert found.written == ledger.hbm(passes, 0).written


@pytest.mark.parametrize("label", ledger.PIPELINES)
def test_a_larger_cache_never_moves_more(label):
    passes = ledger.pipeline(label, *SEED)
    sizes = [ledger.hbm(passes, tenth * TENSOR / 10).bytes for tenth in range(200)]
    assert all(a >= b for a, b in zip(sizes, sizes[1:], strict=False))


def rows(*names):
    return ledger._passes(100, *names)


def test_a_tensor_is_found_if_the_cache_holds_all_that_was_touched_since():
    copies = rows(("one", "x", "a"), ("two", "a", "b"))
    # At the front of `two`, x and a (200 bytes) were touched since; at its end, a and b.
    assert ledger.hbm(copies, 199).read == 200
    assert ledger.hbm(copies, 200).read == 100


def test_a_tensor_of_which_the_cache_holds_a_part_is_read_in_part():
    sums = rows(("one", "x", "a"), ("two", "a y", "b"))
    # 200 bytes at the front of `two`, 300 at its end: 250 reach half way.
    assert ledger.hbm(sums, 250).read == 250


def test_what_lies_between_two_uses_drives_a_tensor_out():
    passes = rows(("one", "x", "a"), ("other", "y", "z"), ("two", "a", "b"))
    assert ledger.hbm(passes, 300).read == 300
    assert ledger.hbm(passes, 400).read == 200


# ---- Nsight Compute's answers: a handwritten log, not a measurement ----

HEADER = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'


def log_of(*kernels: tuple[str, int, int, int, int]) -> str:
    """As ncu --csv writes it: messages, then a row a kernel and metric, with commas."""
    lines = [
        "==PROF== Connected to process 7 (python3)",
        '==PROF== Profiling "kernel" - 0: 0%....50%....100% - 1 pass',
        HEADER,
    ]
    for number, (name, *values) in enumerate(kernels):
        for (metric, unit, _), value in zip(
            traffic.METRICS.values(), values, strict=True
        ):
            lines.append(f'"{number}","7","{name}","{metric}","{unit}","{value:,}"')
    return "\n".join([*lines, "==PROF== Disconnected from process 7"])


MARK = (traffic.MARKER, 0, 900, 0, 0)


def test_the_log_gives_bytes_kernel_by_kernel_in_launch_order():
    kernels = traffic.parse(
        log_of(("first", 1_234_567, 20, 3, 4), ("second", 5, 6, 7, 8))
    )
    assert kernels == [
        {"name": "first", "read_bytes": 1_234_567, "write_bytes": 20,
         "l2_read_bytes": 96, "l2_write_bytes": 128},
        {"name": "second", "read_bytes": 5, "write_bytes": 6,
         "l2_read_bytes": 224, "l2_write_bytes": 256},
    ]  # fmt: skip


def test_a_marker_ends_each_implementation_and_tells_what_was_left_in_l2():
    log = log_of(("a", 1, 2, 0, 0), ("b", 10, 20, 0, 0), MARK, ("c", 5, 6, 0, 0), MARK)
    two, one = traffic.by_label(traffic.parse(log), ["two", "one"])
    assert (two["read_bytes"], two["write_bytes"], two["left_bytes"]) == (11, 22, 900)
    assert [k["name"] for k in two["kernels"]] == ["a", "b"]
    assert (one["read_bytes"], one["write_bytes"]) == (5, 6)


def test_a_lost_group_of_kernels_is_an_error_and_not_a_shift():
    kernels = traffic.parse(log_of(("a", 1, 2, 0, 0), MARK))
    with pytest.raises(ProfilerError, match="2 implementations ran, .* saw 1 groups"):
        traffic.by_label(kernels, ["one", "other"])


def test_a_counter_that_could_not_be_read_is_an_error_and_not_a_zero():
    log = log_of(("a", 1, 2, 0, 0)).replace('"byte","1"', '"","n/a"')
    with pytest.raises(ProfilerError, match="dram__bytes_read.sum came as 'n/a'"):
        traffic.parse(log)


def test_a_metric_that_is_missing_is_an_error():
    without = [s for s in log_of(("a", 1, 2, 3, 4)).split("\n") if "lts__" not in s]
    with pytest.raises(ProfilerError, match="a lacks l2_read_bytes, l2_write_bytes"):
        traffic.parse("\n".join(without))


def test_a_kernel_that_was_replayed_is_told():
    assert traffic.replays(log_of()) == 1
    assert traffic.replays(log_of() + '\n==PROF== "b" - 1: 100% - 3 passes') == 3


# ---- messages ----


def test_a_missing_profiler_is_named(monkeypatch):
    monkeypatch.setattr(traffic.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ProfilerError, match="Nsight Compute .* CUDA toolkit"):
        traffic.find_ncu()


def test_missing_permission_comes_with_ways_to_get_it():
    log = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access ..."
    with pytest.raises(ProfilerError, match="NVreg_RestrictProfilingToAdminUsers=0"):
        traffic.check_log(log)


def test_other_errors_of_the_profiler_are_passed_on():
    with pytest.raises(ProfilerError, match="says: Failed to find metric x"):
        traffic.check_log("==PROF== fine\n==ERROR== Failed to find metric x\n")


@without_a_gpu
@pytest.mark.parametrize("module", ["traffic", "profiled"])
def test_without_a_gpu_one_sentence_says_so(module):
    command = [sys.executable, "-m", "benchmarks", module]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("no CUDA device here, so") and "\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_keeps_clocks_and_profiles_only_the_marked_calls():
    words = traffic.command("ncu", "all", Path("log"), ["seed"])
    for pair in (("--clock-control", "none"), ("--cache-control", "all"),
                 ("--profile-from-start", "off")):  # fmt: skip
        assert pair in zip(words, words[1:], strict=False)
    assert words[-2:] == ["benchmarks.profiled", "seed"]


# ---- the stored record ----


# At the record's commit one of 133 programs began when the others had ended, at the large
# shape, and read k and v of 30 of 64 heads again (chapter 13). So the record misses the goals.
# A record that meets them fails here, and these lines go.
AGAIN = 30 * 2 * math.prod(LARGE[2:]) * 2  # bytes of k and v
missed = pytest.mark.xfail(strict=True, reason="a late program reads k and v again")


def test_our_bf16_kernels_read_k_and_v_of_the_late_heads_twice_and_nothing_else():
    case = records.case("traffic", "C2048")
    for label in ("fused", "triton"):
        inputs = ledger.hbm(ledger.pipeline(label, *LARGE)).read
        read = case["traffic"][label]["none"]["read_bytes"]
        assert read == pytest.approx(inputs + AGAIN, rel=0.02), label


@missed
def test_the_fused_pass_at_the_large_shape_moves_less_than_half_of_flash_and_an_eager_skip():
    assert records.traffic_share("C2048", "fused", "flash_eager") <= 0.50


@missed
def test_the_fused_pass_at_the_large_shape_moves_at_most_7_percent_more_than_5_tensors():
    five_tensors = ledger.total(ledger.pipeline("fused", *LARGE)) / 1e6
    assert records.traffic_mb("C2048", "fused") <= 1.07 * five_tensors


@missed
def test_the_fused_pass_at_the_large_shape_moves_30_percent_less_than_a_compiled_skip():
    assert records.traffic_share("C2048", "fused", "flash_compiled") <= 0.70


def test_the_counters_agree_with_the_bytes_of_one_simple_kernel():
    for case in records.record("traffic")["cases"]:
        found = case["traffic"]["negate"]["none"]
        tensor = math.prod(case[size] for size in "BHND") * 2
        assert found["read_bytes"] == pytest.approx(tensor, rel=0.01)
        if (
            case["name"] != "seed"
        ):  # the first call that the profiler sees has 12 MB too many (chapter 13)
            written = found["write_bytes"] + found["left_bytes"]
            assert written == pytest.approx(tensor, rel=0.02)


def test_with_empty_caches_the_ledger_counts_the_reads_of_the_main_shape():
    """Within 3 %: the ledger leaves out what has one number a row."""
    case = records.case("traffic", "seed")
    for label, found in case["traffic"].items():
        read = ledger.hbm(ledger.pipeline(label, *SEED)).read
        assert found["all"]["read_bytes"] == pytest.approx(read, rel=0.03), label


def test_no_kernel_was_replayed_for_the_stored_record():
    for case in records.record("traffic")["cases"]:
        assert set(case["passes"].values()) == {1}


def test_the_table_shows_every_implementation_of_the_record():
    cases = records.record("traffic")["cases"]
    shown = traffic.traffic_table(cases)
    assert all(label in shown for case in cases for label in case["traffic"])
