"""Backends and a sketch for the tests of the CountSketch kernels."""

from merit_fast.kernels.sketch import CountSketch

BACKENDS = ["cpu", "eager"]
SKETCH = CountSketch(proj_dim=3 * 4096, seed=3)  # three buckets: no power of two
