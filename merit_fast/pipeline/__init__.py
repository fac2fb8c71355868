"""One configured run: the stages in order, each skipped when its output is up to date.

Takes a YAML file or flags and leaves a directory with the output of every stage.
``cli`` and ``merit_fast.run`` call it.
"""
