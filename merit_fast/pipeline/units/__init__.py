"""Units of a run: the pieces of work that other processes and machines can do, each a command."""
