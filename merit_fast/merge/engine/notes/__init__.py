"""Sentences of a merge's summary about tensors that it filled, left out or counted."""
