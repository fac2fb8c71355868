"""Merges without output files: of state dicts in memory, or of checkpoints while a model loads."""
