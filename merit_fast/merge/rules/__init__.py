"""The arithmetic of every merge method: one tensor's parameters become the engine's numbers.

Parameters of a tensor come in; coefficients, delta rules or a user's function go out. Called by the
table of methods.
"""
