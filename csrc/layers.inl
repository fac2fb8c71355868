// Norms, gated activations and rotary positions. Included inside a level's namespace.

const LayerKernels layer_kernels = {};
