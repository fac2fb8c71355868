"""A model whose layers stay in its files: one at a time is in memory, in both passes.

A checkpoint comes in, and a model of transformers goes out that runs as any other does. The sketch
stage loads models so that do not fit into memory.
"""
