"""Which datasets form a group: every way to search a partition under balance and pins.

A similarity matrix and a problem come in; groups go out. Only ``split.decide`` calls it.
"""
