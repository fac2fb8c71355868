"""Quantised outputs: which tensors get which form, and values as codes with fresh scales."""
