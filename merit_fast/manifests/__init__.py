"""The files in which stages meet: schemas, and the only code that writes and renames files.

Every stage reads and writes through this folder; no stage imports another.
"""
