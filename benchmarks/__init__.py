"""What a measuring engineer runs: python -m benchmarks --help."""

from benchmarks.stored import ROOT, open_record, records

__all__ = ["ROOT", "open_record", "records"]
