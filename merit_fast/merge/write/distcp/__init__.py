"""Writes torch's distributed checkpoints, without torch."""
