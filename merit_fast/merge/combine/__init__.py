"""Numbers of a merge: a weight per model, and coefficients or a delta rule per tensor."""
