"""The command `merge`: its flags, its work, the branches of a run, numbers chosen on rows."""
