# Assigned: it is the help, and python -OO drops docstrings.
__doc__ = """\
The book's measurements, and yours: python -m benchmarks COMMAND

    suites      times the implementations on this machine's GPU: a record a suite
    traffic     counts the bytes that cross HBM, by the hardware's own counters
    compare     two records: has something become slower?
    profiled    runs implementations once each, where a profiler can see them

python -m benchmarks COMMAND --help says more.
"""

import importlib
import os
import sys

COMMANDS = {
    "suites": "run_suites",
    "traffic": "traffic",
    "compare": "regression",
    "profiled": "profiled",
}


def main() -> None:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__.strip())
    elif command in COMMANDS:
        importlib.import_module(f"benchmarks.{COMMANDS[command]}").main(arguments)
    else:
        print(
            f"no command {command!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr
        )
        sys.exit(2)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # × and ± where only ASCII can be shown
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
