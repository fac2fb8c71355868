"""Our kernels in one transformers model: norms, gated MLPs, rotary positions, the head's loss.

A model comes in and is changed in place; ``patch_model`` returns a record of what it
replaced, which can undo it. ``train`` and users' training scripts call it.
"""
