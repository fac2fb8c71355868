"""The arithmetic of every merge method: from one tensor's parameters to the numbers that the engine uses.

Parameters of a tensor come in; coefficients, delta rules or a user's function go out. Called by the table of methods.
"""
