"""Reads mergekit's YAML recipes as merges of this package. Errors name unsupported keys."""
