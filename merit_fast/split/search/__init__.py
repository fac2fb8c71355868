"""Search for groups: every method to partition datasets under balance and pins.

A similarity matrix and the user's pins come in; labels go out. Only ``split.decide`` calls it.
"""
