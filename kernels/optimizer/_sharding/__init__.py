"""Parameters that several processes share: places of local elements, norms of whole gradients."""
