"""Keeps the examples of a dataset as arrays: in memory, or in files that are mapped into memory."""

from merit_fast.data.store.build import Draw, TokenStore, build_examples
from merit_fast.data.store.examples import StoredExamples

__all__ = ["Draw", "StoredExamples", "TokenStore", "build_examples"]
