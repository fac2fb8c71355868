"""Finished outputs of a run in a place that is no shared disk: an object store, or any folder.

Input: a path or an fsspec URL. Output: files here and there, each proved by its hash. Callers: the
units of a run, and the driver that asks what is done.
"""
