# Assigned: it is the help, and python -OO drops docstrings.
__doc__ = """\
The book's measurements, and yours: python -m benchmarks suites [NAME ...] [OPTIONS]

    suites quick                       half a minute: tables, and the record quick.json
    suites seed video --out mine/      records in a folder of yours
    suites seed --out mine.json        one record, one file
    suites attention --baseline        have ratios moved against the stored record? Exit 1 if
                                       something became slower; stores nothing without --out
    suites seed --baseline mine.json   against a record of yours
    suites seed --baseline --reference fused   ratios to an implementation of your choice
    suites --shape 2,4096,1536,12      your own B, N, C and number of heads

Without a NAME all of them. Each is one record: quick, seed, video, wan, scaling, batch, dims
(all implementations side by side), layers (whole modules), launch (the host time of a call);
ceilings (copy bandwidth, bf16 matrix rate), skip (chapter 4), attention, tiles and one_over_n
(chapter 6), gradients (chapter 8), projection, modules and blocks (chapter 9), sage_quantize,
sage, sage_crossover and sage_accuracy (chapters 10 to 12); ladder (from chapter 5's kernel to
chapter 7's, in steps) and timeline (when the warps of one SM do what; chapter 7).
`sageattention==1.0.6` is timed too where it is installed.

Every implementation of the skip is checked first, on the very inputs it is timed on, and
refused a time if it is wrong; the record's method says against what. One that is not supported
or runs out of memory is named with the reason. Ctrl-C keeps the cases that are done. Without a
GPU the stored records are shown.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import open_record, records, regression
from benchmarks.provenance import file_of, save
from benchmarks.suites import SUITES
from benchmarks.suites.peers import CHECKED
from benchmarks.suites.suite import Suite, side_by_side
from rcmlib.measure import timing
from rcmlib.measure.benchmark import PEERS, check_sizes, table

INTERRUPTED = 130  # what a shell reports after Ctrl-C


def main(arguments: list[str]) -> None:
    parser = argument_parser()
    options = parser.parse_args(arguments)
    suites = chosen_suites(parser, options)
    if not torch.cuda.is_available():
        sys.exit(show_stored(options))
    status = 0
    for name, suite in suites.items():
        old = options.baselines.get(name)
        status = max(status, run_suite(name, suite, options, old))
        if status == INTERRUPTED:
            break
    sys.exit(status)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks suites",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--shape", metavar="B,N,C,HEADS")
    parser.add_argument("--out", type=Path, metavar="FOLDER or FILE.json")
    parser.add_argument("--baseline", nargs="?", const="", metavar="RECORD")
    parser.add_argument("--reference", metavar="IMPLEMENTATION")
    parser.add_argument("--tolerance", type=float, default=regression.TOLERANCE)
    return parser


def chosen_suites(parser, options) -> dict[str, Suite]:
    """The suites to run; completes options.out and options.baselines. Ends on bad options."""
    if options.shape and options.names:
        parser.error("give names of suites or --shape, not both")
    if unknown := [name for name in options.names if name not in SUITES]:
        parser.error(f"no suite {unknown[0]!r}; there are: {', '.join(SUITES)}")
    options.names = options.names or list(SUITES)
    try:
        suites = (
            {"shape": own_shape(options.shape)}
            if options.shape
            else {name: SUITES[name] for name in options.names}
        )
        options.baselines = {}
        if options.baseline is not None:
            given = options.baseline
            options.baselines = {name: open_record(given or name) for name in suites}
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    one_file = [
        value
        for value in (options.baseline, options.out and str(options.out))
        if value and value.endswith(".json")
    ]
    if len(suites) > 1 and one_file:
        parser.error(f"{one_file[0]} is one record, and there are {len(suites)} suites")
    if options.out is None and options.baseline is None and not options.shape:
        options.out = records.folder
    return suites


def own_shape(text: str) -> Suite:
    """A suite of one case: all implementations at the shape B,N,C,HEADS."""
    numbers = text.split(",")
    if len(numbers) != 4 or not all(n.strip().isdecimal() for n in numbers):
        raise ValueError(f"--shape must be four numbers B,N,C,HEADS, got {text!r}")
    numbers = [int(n) for n in numbers]
    shapes = {"B{}_N{}_C{}_H{}".format(*numbers): check_sizes(*numbers)}
    return side_by_side("All implementations at one shape.", CHECKED, shapes, PEERS)


def run_suite(name: str, suite: Suite, options, old: dict | None) -> int:
    """Measures, prints, stores and compares one suite; the exit status."""
    cases: list[dict] = []
    try:
        for arguments in tqdm(suite.each, desc=name, disable=None):
            for case in suite.cases(*arguments):
                cases.append(case)
                tqdm.write(f"{table(case)}\n")
            timing.free()
    except BaseException as stop:
        print(keep_what_is_done(name, suite, cases, options.out))
        if isinstance(stop, KeyboardInterrupt):
            return INTERRUPTED
        raise
    if options.out:
        print(f"stored: {store(name, suite, cases, options.out)}")
    if old is None:
        return 0
    device = {"device": torch.cuda.get_device_name()}
    now = {"name": name, "provenance": device, "cases": cases}
    reference = options.reference or suite.reference
    return regression.judge(now, old, reference, options.tolerance)


def store(name: str, suite: Suite, cases: list[dict], out: Path) -> Path:
    method = f"{suite.timing} {suite.method}"
    return save(name, suite.what, method, cases, out)


def keep_what_is_done(
    name: str, suite: Suite, cases: list[dict], out: Path | None
) -> str:
    """Stores an interrupted suite's cases beside its record, which stays; says what it did."""
    done = f"{name}: interrupted after {len(cases)} case(s)"
    if not cases:
        return f"{done}; nothing to store"
    if out is None:
        return f"{done}; shown above, not stored without --out"
    path = file_of(name, out)
    # No .json at the end: what reads the folder's records does not see it.
    partial = path.with_name(f"{path.name}.partial")
    return f"{done}; stored: {store(name, suite, cases, partial)}"


def show_stored(options) -> int:
    """Without a GPU: says so, and prints the suites' stored records; the exit status."""
    print("There is no CUDA device here, so nothing can be measured.")
    if options.shape or options.baseline is not None:
        print("An own shape or a baseline needs one.", file=sys.stderr)
        return 1
    missing = [name for name in options.names if name not in records.names()]
    for name in options.names:
        if name not in missing:
            print(stored(name))
    if missing:
        print(f"no stored record of: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def stored(name: str) -> str:
    """A stored record as text: what, where, and a table for each case."""
    record = records.record(name)
    tables = "\n\n".join(table(case) for case in record["cases"])
    return f"\n{name}: {record['what']}\n{records.machine(name)}\n\n{tables}"
