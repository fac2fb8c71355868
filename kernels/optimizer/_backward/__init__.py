"""Updates inside the backward pass: the hooks, and what stands for a used gradient."""
