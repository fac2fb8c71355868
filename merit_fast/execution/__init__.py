"""Runs the units of a run on the machines that there are; every unit is a command of its own."""
