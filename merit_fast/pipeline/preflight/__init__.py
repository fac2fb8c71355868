"""Everything that can be told before the first heavy step: the checks of a run, and its forecast.

Headers, config and rows decide; nothing is written.
"""
