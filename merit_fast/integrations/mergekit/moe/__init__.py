"""mergekit-moe's recipes: dense models become the experts of one mixture of experts."""
