"""Bytes, times and machine code: everything the book claims is measured from here."""
