"""Selection of a mixture's rows by their stored sketches: the work of select and duplicates."""
