"""What a model folder holds next to its weights: other models, and files that are left out."""
