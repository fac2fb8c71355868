"""What the inputs of a merge hold: headers, adapters, 8-bit tensors with scales, stacked layers, files next to the weights.

Directories and URLs come in; checked tensor entries go out. No tensor data is read here.
"""
