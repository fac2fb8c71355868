"""Rows that stay: every example's sketch in a store, which is searched by a target.

The sketch stage writes the store (``writer``, ``reuse``); ``merit_fast.open_rows`` reads it.
"""
