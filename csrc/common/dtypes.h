// Element types of tensors.
#pragma once
#include <cstddef>
#include <cstdint>

// Codes shared with FLOAT_DTYPES of kernels/average/__init__.py.
enum class DType : int32_t { BF16 = 0, F16 = 1, F32 = 2, F64 = 3 };

inline size_t item_bytes(DType t) { return t == DType::F64 ? 8 : t == DType::F32 ? 4 : 2; }
