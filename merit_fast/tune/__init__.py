"""What a merge leaves to held-out rows: its scale, its weights. Above the stages: it evaluates merges, says numbers.

``fit`` (pure NumPy) says where to look and what the losses found there mean; ``rows`` which rows are looked at;
``search`` evaluates merges that are made straight into a model; ``command`` is the same for checkpoints without a run.
"""
