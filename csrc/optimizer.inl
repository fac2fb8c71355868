// AdamW in one pass over each parameter. Included inside a level's namespace.

const OptimizerKernels optimizer_kernels = {};
