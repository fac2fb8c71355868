"""Trains the branches of a split by another stack: files out, a process, a checked model back."""
