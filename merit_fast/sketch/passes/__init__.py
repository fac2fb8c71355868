"""One forward pass and its backward passes: the self-check, and what no tap covers.

``sketch.gradients`` attaches them, round the taps of ``sketch.capture``.
"""
