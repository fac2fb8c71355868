"""The forms that our layer kernels compute: how a module is matched, and its forward is made."""
