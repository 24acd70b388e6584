"""The book's measurements, and yours: python -m benchmarks.__main__ OPTIONS

    --suite quick                      half a minute: tables, and the record quick.json
    --suite seed video --out mine/     records in a folder of yours
    --suite seed --out mine.json       one record, one file
    --suite attention --baseline       have ratios moved against the stored record? Exit 1 if
                                       something became slower; stores nothing without --out
    --suite seed --baseline mine.json  against a record of yours
    --suite seed --baseline --reference fused   ratios to an implementation of your choice
    --shape 2,4096,1536,12             your own B, N, C and number of heads

Suites, each one record: quick, seed, video, wan, scaling, batch, dims (all implementations side
by side), layers (whole modules), launch (the host time of a call); ceilings (copy bandwidth,
bf16 matrix rate), skip (chapter 4), attention, tiles and one_over_n (chapter 6), gradients
(chapter 7), projection, modules and blocks (chapter 8), sage_quantize, sage, sage_crossover and
sage_accuracy (chapters 9 to 11). `sageattention==1.0.6` is timed too where it is installed.

Every implementation of the skip is checked first, on the very inputs it is timed on, and
refused a time if it is wrong; the record's method says against what. One that is not supported
or runs out of memory is named with the reason. Ctrl-C keeps the cases that are done. Without a
GPU the stored records are shown.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import regression
from benchmarks.suites import SUITES
from benchmarks.suites.peers import CHECKED
from benchmarks.suites.suite import INPUTS, Suite, side_by_side
from rcmlib.measure import records
from rcmlib.measure.benchmark import PEERS, check_sizes
from rcmlib.measure.tables import table

INTERRUPTED = 130  # what a shell reports after Ctrl-C


def main() -> None:
    parser = argument_parser()
    options = parser.parse_args()
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
        prog="python -m benchmarks.__main__",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", nargs="+", choices=SUITES, metavar="NAME")
    parser.add_argument("--shape", metavar="B,N,C,HEADS")
    parser.add_argument("--out", type=Path, metavar="FOLDER or FILE.json")
    parser.add_argument("--baseline", nargs="?", const="", metavar="RECORD")
    parser.add_argument("--reference", metavar="IMPLEMENTATION")
    parser.add_argument("--tolerance", type=float, default=regression.TOLERANCE)
    return parser


def chosen_suites(parser, options) -> dict[str, Suite]:
    """The suites to run; completes options.out and options.baselines. Ends on bad options."""
    if options.shape and options.suite:
        parser.error("give --suite or --shape, not both")
    options.suite = options.suite or list(SUITES)
    try:
        suites = (
            {"shape": own_shape(options.shape)}
            if options.shape
            else {name: SUITES[name] for name in options.suite}
        )
        options.baselines = {}
        if options.baseline is not None:
            options.baselines = {n: baseline(options.baseline, n) for n in suites}
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
        options.out = records.FOLDER
    return suites


def own_shape(text: str) -> Suite:
    """A suite of one case: all implementations at the shape B,N,C,HEADS."""
    numbers = text.split(",")
    if len(numbers) != 4 or not all(n.strip().isdecimal() for n in numbers):
        raise ValueError(f"--shape must be four numbers B,N,C,HEADS, got {text!r}")
    shape = check_sizes(*map(int, numbers))
    name = "B{}_N{}_C{}_H{}".format(*map(int, numbers))
    run = side_by_side({name: shape}, PEERS)
    return Suite("All implementations at one shape.", f"{INPUTS} {CHECKED}", run)


def baseline(given: str, suite: str) -> dict:
    """The record to compare with: a file, a stored record's name, or the suite's own."""
    if given.endswith(".json"):
        return json.loads(Path(given).read_text())
    return records.record(given or suite)


def run_suite(name: str, suite: Suite, options, old: dict | None) -> int:
    """Measures, prints, stores and compares one suite; the exit status."""
    cases: list[dict] = []
    try:
        for case in tqdm(suite.run(), desc=name, disable=None):
            cases.append(case)
            tqdm.write(f"{table(case)}\n")
    except BaseException as stop:
        print(keep_what_is_done(name, suite, cases, options.out))
        if isinstance(stop, KeyboardInterrupt):
            return INTERRUPTED
        raise
    if options.out:
        print(f"stored: {store(name, suite, cases, options.out)}")
    if old is None:
        return 0
    reference = options.reference or suite.reference
    rows = regression.compare(cases, old["cases"], reference, options.tolerance)
    device = old["provenance"]["device"]
    if device != torch.cuda.get_device_name():
        print(f"the baseline is from another GPU: {device}")
    print(f"{name}: {regression.report(rows)}")
    return 0 if regression.passes(rows) else 1


def store(name: str, suite: Suite, cases: list[dict], out: Path) -> Path:
    method = f"{suite.timing} {suite.method}"
    return records.save(name, suite.what, method, cases, out)


def keep_what_is_done(
    name: str, suite: Suite, cases: list[dict], out: Path | None
) -> str:
    """Stores an interrupted suite's cases beside its record, which stays; says what it did."""
    done = f"{name}: interrupted after {len(cases)} case(s)"
    if not cases:
        return f"{done}; nothing to store"
    if out is None:
        return f"{done}; shown above, not stored without --out"
    path = records.file_of(name, out)
    # No .json at the end: what reads the folder's records does not see it.
    partial = path.with_name(f"{path.name}.partial")
    return f"{done}; stored: {store(name, suite, cases, partial)}"


def show_stored(options) -> int:
    """Without a GPU: says so, and prints the suites' stored records; the exit status."""
    print("There is no CUDA device here, so nothing can be measured.")
    if options.shape or options.baseline is not None:
        print("An own shape or a baseline needs one.", file=sys.stderr)
        return 1
    missing = [name for name in options.suite if name not in records.names()]
    for name in options.suite:
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


if __name__ == "__main__":
    main()
