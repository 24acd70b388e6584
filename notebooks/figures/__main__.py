"""python -m notebooks.figures: redraws the landing page's picture from the records."""

import hashlib
from pathlib import Path

from notebooks.figures.epilogue import headline
from notebooks.measurements import records

PICTURE = Path(__file__).parents[2] / "book" / "_static" / "headline.png"


def fingerprint() -> str:
    """Of the record the picture shows; it is stored in the PNG, and a test compares it."""
    path = records.folder / "attention.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    headline().savefig(PICTURE, metadata={"Source": fingerprint()})
    print(f"wrote {PICTURE.name}")
