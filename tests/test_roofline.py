"""The roofline's arithmetic, on ceilings made up for it, and the kernel that measures exp2."""

import re

import pytest

from benchmarks import records, roofline
from benchmarks.roofline import Ceilings, Work
from benchmarks.suites import ceilings as suite
from rcmlib.measure import compile as ptx
from rcmlib.measure import ledger

# Round numbers, no machine's: bytes, FLOP and exp2 a second.
MADE_UP = Ceilings(1e12, {"bf16": 1e15, "fp8": 2e15, "int8": 2e15}, 4e12)
SEED = (4, 12, 2048, 64)
SCORES = 4 * 12 * 2048**2


def test_attention_takes_four_flop_a_score_and_channel_and_one_exp2_a_score():
    work = roofline.work("fused", *SEED)
    assert work.matrix_flop == {"bf16": 4 * SCORES * 64}
    assert work.exp2 == SCORES * (1 + 1 / 128)
    assert work.hbm_bytes == ledger.total(ledger.pipeline("fused", *SEED))


def test_eight_bits_split_the_flop_between_int8_and_fp8():
    half = 2 * SCORES * 64
    assert roofline.work("sage", *SEED).matrix_flop == {"int8": half, "fp8": half}


def test_a_negation_multiplies_nothing():
    work = roofline.work("negate", *SEED)
    assert work.matrix_flop == {} and work.exp2 == 0
    assert roofline.binding(work, MADE_UP) == "HBM"


def test_the_naive_softmax_rescales_nothing():
    assert roofline.work("naive", *SEED).exp2 == SCORES


def test_each_ceiling_is_work_over_rate():
    work = Work(2e9, {"int8": 2e12, "fp8": 4e12}, 8e9)
    assert roofline.ceiling_ms(work, MADE_UP) == pytest.approx(
        {"HBM": 2.0, "matrix": 3.0, "exp2": 2.0}
    )
    assert roofline.binding(work, MADE_UP) == "matrix"


def test_a_fraction_is_the_ceiling_over_the_measured_time():
    work = Work(2e9, {"bf16": 1e12}, 8e9)
    found = roofline.fractions(work, MADE_UP, measured_ms=4.0)
    assert found == pytest.approx({"HBM": 0.5, "matrix": 0.25, "exp2": 0.5})


def test_by_the_data_sheet_exp2_and_bf16_products_meet_at_heads_of_64():
    """4096 FLOP and 16 exp2 a clock on a Hopper SM: D/1024 clocks a score against 1/16."""
    hopper = Ceilings(1e30, {"bf16": 4096, "fp8": 8192, "int8": 8192}, 16)

    def wall(label, dim):
        times = roofline.ceiling_ms(roofline.work(label, 1, 1, 1 << 20, dim), hopper)
        return times["exp2"] / times["matrix"]

    assert wall("fused", 64) == pytest.approx(1, rel=0.01)
    assert wall("fused", 128) == pytest.approx(1 / 2, rel=0.01)
    assert wall("sage", 64) == pytest.approx(2, rel=0.01)
    assert wall("sage", 128) == pytest.approx(1, rel=0.01)


def test_the_exp2_kernel_is_one_instruction_an_exp2_and_none_is_folded():
    code = ptx.compile_kernels([ptx.Job("exp2")])[0]
    links = re.findall(r"ex2\.approx\.ftz\.f32\s+(%\w+), (%\w+);", code.ptx)
    chains_a_thread = suite.CHAINS // 128
    assert len(links) == chains_a_thread * suite.UNROLL
    assert len({result for result, _ in links}) == len(links)  # none is shared
    assert code.spill_bytes == 0


def test_the_stored_ceilings_are_those_of_a_gpu():
    found = roofline.measured()
    assert 1e12 < found.hbm_bytes < 1e13
    assert found.matrix_flop["fp8"] > found.matrix_flop["bf16"]
    exp2 = records.case("ceilings", "exp2")
    clock = 1e6 * records.record("ceilings")["provenance"]["max_sm_clock_mhz"]
    a_clock = found.exp2 / exp2["multiprocessors"] / clock
    assert 8 < a_clock < 16.5  # an SM has sixteen units
