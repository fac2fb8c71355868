"""Inputs of a merge: headers, adapters, 8-bit tensors, stacked layers, files next to the weights.

Directories and URLs come in; checked tensor entries go out. No tensor data is read here.
"""
