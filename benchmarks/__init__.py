"""What a measuring engineer runs: python -m benchmarks --help."""

import json
from pathlib import Path

from rcmlib.measure.records import Records

ROOT = Path(__file__).resolve().parent.parent  # of the clone
records = Records(ROOT / "notebooks" / "measurements")


def open_record(given: str) -> dict:
    """A record: of a .json file, or the stored one of that name. FileNotFoundError."""
    if given.endswith(".json"):
        return json.loads(Path(given).read_text())
    return records.record(given)
