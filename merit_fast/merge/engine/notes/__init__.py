"""What the summary of a merge says about tensors: filled, left out, counted."""
