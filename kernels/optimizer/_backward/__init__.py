"""Updates inside the backward pass: the hooks, and the tensor in the place of a used gradient."""
