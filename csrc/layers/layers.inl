// Helpers and table of the layers' kernels at one level.

// Elements below which waking a thread takes longer than the work.
static const int64_t kWorthAThread = 1 << 14;

static inline int useful_threads(int64_t elements, int threads) {
  return elements < 2 * kWorthAThread ? 1 : threads;
}

template <class T>
static inline T* row_of(const LayerMatrix& m, int64_t row) {
  return static_cast<T*>(m.data) + row * m.stride;
}

#include "layers/norm.inl"
#include "layers/gated.inl"
#include "layers/rope.inl"

extern const LayerKernels layer_kernels = {
    .norm = norm,
    .norm_backward = norm_backward,
    .gated = gated,
    .rope = rope,
};
