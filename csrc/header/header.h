// Headers of safetensors files in their plain form, read in one pass with a bound on the tensors.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

struct HeaderTensor {
  std::string_view name, dtype;  // of the header's text
  std::vector<int64_t> shape;
  int64_t begin, end;  // bytes, from the end of the header
};

// `tensors` are in the order of their bytes. Where `error` is not -1, the text is not in the plain
// form from this byte on, and `tensors` holds nothing of use.
struct Header {
  std::vector<HeaderTensor> tensors;
  int64_t error = -1;
  bool too_many = false;
};

// Plain: JSON objects of exactly dtype, shape and data_offsets; printable ASCII in names without
// escapes; names that differ; offsets that follow each other from 0 on without a hole. Whether a
// dtype is known and fits the offsets is left to the caller.
Header parse_header(std::string_view text, size_t most_tensors);
