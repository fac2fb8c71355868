"""Low-rank adapters of a branch: options and the frozen base go in, a PEFT folder comes out.

``config`` declares the options, ``targets`` finds the modules, ``build`` puts the adapter on a
model, ``save`` writes it. The train stage and the preflight checks call them.
"""
