"""Decides which rows of which files are the parts of each dataset."""
