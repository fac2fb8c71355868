#include <algorithm>
#include <cerrno>
#include <mutex>

#include "elements/elements.h"
#include "engine/tensor_reader.h"

namespace {

const int64_t kColumns = 2048;  // columns that one worker holds at a time
const int64_t kRows = 4096;     // rows whose Gram matrices one worker holds at a time

// Whole rows pass through the buffers once: products, weights, sums.
class RowMerge {
 public:
  RowMerge(const Engine& engine, const Segment& tensor, const VectorJob& job)
      : engine_(engine),
        tensor_(tensor),
        job_(job),
        pool_(engine.threads),
        reader_(engine, tensor, job.length, &pool_, 0) {}

  MergeResult run() {
    const int64_t item = int64_t(item_bytes(tensor_.output_type));
    reader_.for_each_chunk([&](Buffers* b, int, int64_t chunk) {
      const int64_t n = reader_.length(chunk);
      if (!reader_.read_all_inputs(b, chunk)) return false;
      bool finite = true;
      if (!mix(b, n, &finite)) return reader_.fail(EIO, chunk, -1, false);
      if (!finite && !engine_.allow_nonfinite) return reader_.fail(0, chunk, -1, true);
      const int64_t at = tensor_.output_offset + chunk * reader_.chunk_elements() * item;
      const int error = write_output(engine_, tensor_, b->out, n * item, at);
      if (error) return reader_.fail(error, chunk, -1, false);
      __atomic_fetch_add(engine_.elements_done, n, __ATOMIC_RELAXED);
      return true;
    });
    return reader_.result();
  }

 private:
  bool mix(Buffers* b, int64_t n, bool* finite) const {
    const int64_t rows = n / job_.length;
    for (int64_t r = 0; r < rows; r += kRows)
      if (!mix_rows(b, r, std::min(kRows, rows - r), finite)) return false;
    return true;
  }

  bool mix_rows(Buffers* b, int64_t row, int64_t rows, bool* finite) const {
    const size_t size = size_t(job_.branches) * size_t(job_.branches);
    const size_t inputs = tensor_.inputs.size();
    std::vector<double> gram(size_t(rows) * size, 0.0);
    std::vector<double> weights(size_t(rows) * inputs, 0.0);
    std::vector<double> space(gram_scratch(job_.branches));
    for (int64_t r = 0; r < rows; r++)
      engine_.kernels.delta_gram(b->inputs.data(), reader_.types().data(), job_.branches,
                                 job_.from_base, (row + r) * job_.length, job_.length,
                                 gram.data() + size_t(r) * size, space.data());
    if (!job_.weights(gram.data(), rows, weights.data())) return false;
    std::vector<const void*> at(inputs);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t first = (row + r) * job_.length;
      for (size_t k = 0; k < inputs; k++)
        at[k] = static_cast<const char*>(b->inputs[k]) +
                first * int64_t(item_bytes(reader_.types()[k]));
      *finite &= engine_.kernels.weighted_average(
          at.data(), reader_.types().data(), weights.data() + size_t(r) * inputs, int(inputs),
          b->out + first * int64_t(item_bytes(tensor_.output_type)), tensor_.output_type,
          job_.length);
    }
    return true;
  }

  const Engine& engine_;
  const Segment& tensor_;
  const VectorJob& job_;
  Pool pool_;
  TensorReader reader_;
};

// A worker takes a block of columns, reads it row by row, and then once more to write it.
class ColumnMerge {
 public:
  ColumnMerge(const Engine& engine, const Segment& tensor, const VectorJob& job)
      : engine_(engine),
        tensor_(tensor),
        job_(job),
        rows_(tensor.elements / job.period),
        width_(std::min(kColumns, job.period)) {
    for (const SourcePtr& s : tensor.inputs) {
      types_.push_back(s->type());
      scratch_bytes_ = std::max(scratch_bytes_, s->scratch_bytes(width_));
    }
  }

  MergeResult run() {
    for_each_item((job_.period + width_ - 1) / width_, engine_.threads, [&](int, int64_t block) {
      return merge(block * width_, std::min(width_, job_.period - block * width_));
    });
    const int64_t bytes = tensor_.elements * int64_t(item_bytes(tensor_.output_type));
    if (result_.segment < 0 && engine_.written && tensor_.output_fd >= 0)
      engine_.written->add(tensor_.output_offset, bytes);  // once: blocks of columns lie in pieces
    return result_;
  }

 private:
  struct Block {
    std::vector<std::vector<double>> memory;  // 8 bytes an element hold every type
    std::vector<const void*> inputs;
    Memory scratch;
    std::vector<double> out, deltas;
  };

  bool fail(int error, int64_t input, bool nonfinite) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (result_.segment < 0) result_ = {error, 0, 0, input, nonfinite};
    return false;
  }

  bool read(Block* b, int64_t first, int64_t n) {
    for (size_t k = 0; k < tensor_.inputs.size(); k++) {
      const int error =
          tensor_.inputs[k]->read({engine_.kernels, engine_.remote, engine_.wide_runs}, first, n,
                                  reinterpret_cast<char*>(b->memory[k].data()), b->scratch.get());
      if (error) return fail(error, int64_t(k), false);
    }
    return true;
  }

  bool merge(int64_t column, int64_t n) {
    const size_t count = tensor_.inputs.size();
    const size_t branches = size_t(job_.branches);
    Block b;
    b.memory.resize(count, std::vector<double>(size_t(n)));
    for (const std::vector<double>& input : b.memory) b.inputs.push_back(input.data());
    b.scratch = page_aligned(scratch_bytes_ + 64);
    if (!b.scratch) return fail(ENOMEM, -1, false);
    b.out.resize(size_t(n));
    b.deltas.resize(branches * size_t(kMixBlock));
    std::vector<double> products(branches * branches * size_t(n), 0.0);
    for (int64_t r = 0; r < rows_; r++) {
      if (!read(&b, r * job_.period + column, n)) return false;
      engine_.kernels.add_products(b.inputs.data(), types_.data(), job_.branches, job_.from_base, n,
                                   products.data(), b.deltas.data());
    }
    std::vector<double> weights;
    if (!weigh(products, n, &weights)) return fail(EIO, -1, false);
    const int64_t item = int64_t(item_bytes(tensor_.output_type));
    for (int64_t r = 0; r < rows_; r++) {
      const int64_t first = r * job_.period + column;
      if (!read(&b, first, n)) return false;
      const bool finite =
          engine_.kernels.weighted_columns(b.inputs.data(), types_.data(), weights.data(),
                                           int(count), n, b.out.data(), tensor_.output_type);
      if (!finite && !engine_.allow_nonfinite) return fail(0, -1, true);
      const int error = write_all(tensor_.output_fd, reinterpret_cast<const char*>(b.out.data()),
                                  size_t(n * item), tensor_.output_offset + first * item, false);
      if (error) return fail(error, -1, false);
    }
    __atomic_fetch_add(engine_.elements_done, n * rows_, __ATOMIC_RELAXED);
    return true;
  }

  // Turns products [branches, branches, n] into weights [inputs, n].
  bool weigh(const std::vector<double>& products, int64_t n, std::vector<double>* weights) const {
    const size_t size = size_t(job_.branches) * size_t(job_.branches);
    const size_t count = tensor_.inputs.size();
    const size_t columns = size_t(n);
    std::vector<double> gram(columns * size);
    std::vector<double> by_column(columns * count);
    for (size_t i = 0; i < columns; i++)
      for (size_t p = 0; p < size; p++) gram[i * size + p] = products[p * columns + i];
    if (!job_.weights(gram.data(), n, by_column.data())) return false;
    weights->resize(columns * count);
    for (size_t i = 0; i < columns; i++)
      for (size_t k = 0; k < count; k++) (*weights)[k * columns + i] = by_column[i * count + k];
    return true;
  }

  const Engine& engine_;
  const Segment& tensor_;
  const VectorJob& job_;
  const int64_t rows_, width_;
  std::vector<DType> types_;
  size_t scratch_bytes_ = 0;
  std::mutex mutex_;
  MergeResult result_{0, -1, 0, -1, false};
};

}  // namespace

MergeResult merge_vectors(const Engine& engine, const Segment& tensor, const VectorJob& job) {
  if (job.period > 0) return ColumnMerge(engine, tensor, job).run();
  return RowMerge(engine, tensor, job).run();
}
