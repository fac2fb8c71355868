// What linear + cross-entropy needs besides matrix products. Included inside a level's namespace.

const LossKernels loss_kernels = {};
