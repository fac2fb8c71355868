"""Adapters as outputs: several adapters joined into one, and one extracted from a fine-tune.

``products`` reads and cuts low-rank products, ``singular`` has the decompositions, ``files`` writes
an adapter's directory; ``join`` and ``extract`` are the two commands. Needs NumPy only.
"""
