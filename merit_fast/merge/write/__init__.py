"""Where a merge's output goes: shard files with checksums, fsync and shares, or an object store."""
