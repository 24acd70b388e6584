"""The book's records: `records.ratio("seed", "N2048", "cudnn_compiled", "fused")`."""

from pathlib import Path

from rcmlib.measure.records import Records

records = Records(Path(__file__).parent)
