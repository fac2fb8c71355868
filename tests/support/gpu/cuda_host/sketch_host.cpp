// The kernels of csrc/cuda/sketch_linear.cu as a library for the CPU, launched with the bytes that a GPU would get.
#include <cstddef>
#include <string>

#include "sketch_linear.cu"

extern "C" const char* job_layout() {
#define FIELD(name) #name " " + std::to_string(offsetof(Job, name)) + "\n"
  static const std::string layout =
      std::string() + FIELD(dy) + FIELD(x) + FIELD(offsets) + FIELD(scale) + FIELD(out) +
      FIELD(partial) + FIELD(dy_stride) + FIELD(x_stride) + FIELD(scale_stride) + FIELD(rows) +
      FIELD(columns) + FIELD(first_row) + FIELD(first_column) + FIELD(tiles_across) +
      FIELD(group_rows) + FIELD(group_columns) + FIELD(first_group_row) +
      FIELD(first_group_column) + FIELD(groups_across) + FIELD(groups) + FIELD(key) +
      FIELD(examples) + FIELD(buckets) + FIELD(splits) + FIELD(dy_wide) + FIELD(x_wide) + "end " +
      std::to_string(sizeof(Job));
  return layout.c_str();
}

// Returns 0, or 1 if there is no kernel of that name.
extern "C" int launch_kernel(const char* kernel, unsigned blocks, const void* packed,
                             int backwards) {
  Job job;
  std::memcpy(&job, packed, sizeof(job));
  const std::string name = kernel;
  void (*const function)(Job) = name == "sketch_linear_bf16"  ? sketch_linear_bf16
                                : name == "sketch_linear_f32" ? sketch_linear_f32
                                : name == "add_splits"        ? add_splits
                                                              : nullptr;
  if (!function) return 1;
  gpu_shim::launch(blocks, unsigned(kThreads), backwards != 0, 2, [=] { function(job); });
  return 0;
}

// Where floats of the bucket, and bf16 of a stage, lie in shared memory: in elements.
extern "C" int place_in_bucket(int row, int column) { return place(row, column); }
extern "C" int place_in_stage(int token, int chunk) { return Layout<u16>::at(token, chunk); }
