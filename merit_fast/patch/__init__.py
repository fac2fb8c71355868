"""Our kernels inside one transformers model: norms, gated MLPs, rotary positions and the head's loss.

A model comes in and is changed in place; ``patch_model`` returns what it replaced and can undo it. ``train`` and users' training
scripts call it.
"""
