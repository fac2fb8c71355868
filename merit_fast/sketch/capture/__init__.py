"""What a backward pass tells: hooks on a model's modules hand activations and output gradients to the sketch kernels.

``sketch.gradients`` opens it around a model; every parameter's gradient arrives exactly once or is
named in an error.
"""
