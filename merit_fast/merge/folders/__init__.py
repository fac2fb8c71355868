"""Merges of folders that hold several models."""
