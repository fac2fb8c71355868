"""Chooses a merge's scale and weights on held-out rows.

Checkpoints and tokenized rows come in; the chosen numbers go out as tune.json. The pipeline calls
it for `weights: fit` and `scale: auto`, the command ``tune`` for checkpoints without a run.
``rows`` picks the rows, ``search`` evaluates merges in memory, ``fit`` (pure NumPy) proposes the
next ones.
"""
