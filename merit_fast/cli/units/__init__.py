"""The commands on the units of a run."""
