"""tools/fuzz.py and tools/sanitize.py: `make fuzz` and `make sanitize` run them on a GPU."""

import os
import re

import pytest
import torch

import rcmlib
from tests.random_calls import draw_call, kind_of
from tests.random_calls.judge import check
from tools import fuzz, sanitize

FEW = ["--calls", "25"]
on_the_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="make fuzz and make sanitize do more on a GPU"
)


def tensors(call):
    return {n: v for n, v in call.inputs.items() if isinstance(v, torch.Tensor)}


@on_the_cpu
def test_random_calls_agree_with_float64(capsys):
    assert fuzz.main(FEW) == 0
    assert re.search("^0 of 25 calls failed", capsys.readouterr().out, re.M)


def test_the_same_index_draws_the_same_call(device):
    for index in range(30):
        one, two = (draw_call(7, index, torch.device(device)) for _ in range(2))
        assert str(one) == str(two)
        for name, value in tensors(one).items():
            assert torch.equal(value, tensors(two)[name]), name
            assert value.stride() == tensors(two)[name].stride()


def test_a_wrong_result_is_reported_as_a_line_that_repeats_it(monkeypatch, capsys):
    right = rcmlib.rcm_skip
    monkeypatch.setattr(rcmlib, "rcm_skip", lambda **inputs: 1.02 * right(**inputs))
    skips = [index for index in range(40) if kind_of(0, index)[0] == "rcm_skip"]
    assert fuzz.main(["--only", *map(str, skips)]) == 1
    lines = capsys.readouterr().out.splitlines()
    for index, line in zip(skips, lines, strict=False):
        repeats = f"python -m tools.fuzz --seed 0 --only {index}   # rcm_skip("
        assert line.startswith(repeats) and "error" in line
    assert lines[-1].startswith(f"{len(skips)} of {len(skips)} calls failed")


def test_nothing_is_recorded_for_gradients_that_no_one_asks_for():
    recorded = []

    def watched(function):
        def call(*arguments, **options):
            recorded.append(torch.is_grad_enabled())
            return function(*arguments, **options)

        return call

    for index in range(12):
        call = draw_call(0, index, torch.device("cpu"))
        call.spec, call.peer = watched(call.spec), watched(call.peer)
        check(call)
        wanted = call.mode == "grad"
        assert recorded == [wanted, wanted], index
        recorded.clear()


def work_that_dies(pipe, seed):
    """In place of fuzz.work: call 2 kills its process."""
    for index in pipe.recv():
        if index == 2:
            os._exit(3)
        pipe.send((index, 0.5, ""))
    pipe.send(None)


def test_a_process_that_dies_is_reported_and_another_goes_on(monkeypatch):
    monkeypatch.setattr(fuzz, "work", work_that_dies)
    found = list(fuzz.Worker(seed=0).make_calls([1, 2, 3]))
    assert [(index, error) for index, error, _ in found] == [
        (1, 0.5), (2, fuzz.FAILED), (3, 0.5)
    ]  # fmt: skip
    assert found[1][2].endswith("--only 2   # the process died with 3")


def test_one_kind_of_calls_is_one_process_s(monkeypatch):
    """Each index once, whatever the number of processes, and kernels compiled once."""
    batches = []

    def made(worker, indices):
        batches.append(indices)
        return ((index, 0.0, "") for index in indices)

    monkeypatch.setattr(fuzz.Worker, "make_calls", made)
    found = sorted(index for index, *_ in fuzz.share_calls(0, list(range(200)), 3))
    assert found == list(range(200))
    for batch in batches:
        assert len({kind_of(0, index) for index in batch}) == 1


@on_the_cpu
def test_the_variants_for_compute_sanitizer_can_be_called(capsys):
    assert sanitize.main(["--share", "20", "120"]) == 0
    assert re.search(r"^\d+ calls", capsys.readouterr().out, re.M)


@on_the_cpu
def test_without_a_gpu_both_say_so(monkeypatch):
    monkeypatch.setenv("RCM_REQUIRE_GPU", "1")
    with pytest.raises(SystemExit, match="no CUDA device"):
        fuzz.main(FEW)
    with pytest.raises(SystemExit, match="no CUDA device"):
        sanitize.main(["--tools", "memcheck"])
