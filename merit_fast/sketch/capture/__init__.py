"""Hooks on a model's modules hand activations and output gradients to the sketch kernels.

``sketch.gradients`` attaches them. Every parameter's gradient arrives exactly once, or an error
names the parameter.
"""
