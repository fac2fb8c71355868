"""State dicts that an optimizer loads: of its own, of torch, of other libraries."""
