"""The outputs that a run keeps: states for ``status``, folders that ``clean`` can remove."""
