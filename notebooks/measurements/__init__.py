"""The book's records: `records.ratio("seed", "N2048", "cudnn_compiled", "fused")`."""

import re

import pandas as pd

from benchmarks import records

pd.set_option("display.max_colwidth", None)  # a sentence must not end in "..."


def how(name: str) -> pd.DataFrame:
    """How a record was taken: where, when, and its method, one row a sentence."""
    record = records.record(name)
    taken = record["provenance"]
    rows = [
        ("measured", record["what"]),
        ("machine", records.machine(name)),
        ("date, commit", f"{taken['date']}, {taken['commit']}"),
    ]
    first, *others = re.split(r"(?<=\.)\s+", record["method"])
    rows += [("method", first), *map(_topic, others)]
    labels, texts = zip(*rows, strict=True)
    return pd.DataFrame({f"record {name}": texts}, index=labels)


def _topic(sentence: str) -> tuple[str, str]:
    """A sentence of a method, and before it what it is about."""
    if field := re.match(r"(\w+): (.*)", sentence):  # explains a field of the record
        return field[1], field[2]
    if sentence.startswith("bf16"):
        return "inputs", sentence
    return "checks" if re.search("[Cc]hecked|agree", sentence) else "also", sentence
