"""Outputs of a merge: shard files with checksums, fsync and shares, or an object store."""
