"""The files in which stages meet: their schemas, and the only code that writes, renames and checks them.

Every stage reads and writes through this folder; no stage imports another.
"""
