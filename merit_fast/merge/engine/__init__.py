"""Bytes that a merge reads and writes, and the arithmetic between them.

Tensor entries and rules come in; chunks of output go to open files. The native engine and the NumPy
reference give the same bytes. Called by ``prepared``, ``write`` and ``in_memory``.
"""
