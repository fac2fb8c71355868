"""Which numbers a merge uses: a weight per model, and for every tensor coefficients or a rule for its deltas."""
