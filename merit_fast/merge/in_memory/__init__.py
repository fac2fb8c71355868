"""Merges without output files: state dicts that are in memory already, or checkpoints merged while a model loads."""
