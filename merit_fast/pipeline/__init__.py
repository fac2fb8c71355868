"""One configured run: the stages in order, each skipped when its output is up to date.

A YAML file or flags come in; a directory with the output of every stage goes out. ``cli`` and ``merit_fast.run`` call it.
"""
