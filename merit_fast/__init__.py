"""MERIT (arXiv 2606.01717), fast: split a mixture along its gradient conflicts, train apart, merge once.

``import merit_fast`` is light: it imports neither torch, transformers nor triton.
"""

from merit_fast.errors import BackendUnavailableError, InputError, MeritFastError

__version__ = "0.1.0"
__all__ = ["BackendUnavailableError", "InputError", "MeritFastError", "__version__"]
