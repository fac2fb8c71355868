"""Quantised tensors: a table of formats, and codes joined with their scales by it."""
