#include "engine/tensor_reader.h"

#include <algorithm>
#include <cerrno>

namespace {

const int64_t kSampleRuns = 64;     // runs of a sample
const int64_t kSampleLength = 256;  // elements of each
const int64_t kScanBlock = 4096;    // elements whose sizes stay in L1 while they are counted

}  // namespace

TensorReader::TensorReader(const Engine& engine, const Segment& tensor, int64_t row, Pool* pool,
                           int first_worker)
    : engine_(engine),
      tensor_(tensor),
      branches_(int(tensor.inputs.size()) - 1),
      row_(row),
      step_(engine.chunk_elements),
      pool_(pool),
      first_worker_(first_worker),
      workers_(size_t(engine.threads)) {
  if (row > 0) step_ = std::max(row, step_ / row * row);
  step_ = std::min(step_, tensor.elements);
  engine.wide_runs->keep(kWidePerInput * tensor.inputs.size());
  chunks_ = (tensor.elements + step_ - 1) / step_;
  for (const SourcePtr& s : tensor.inputs) types_.push_back(s->type());
}

int64_t TensorReader::length(int64_t chunk) const {
  return std::min(step_, tensor_.elements - chunk * step_);
}

bool TensorReader::fail(int error, int64_t chunk, int64_t input, bool nonfinite) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (result_.segment < 0) result_ = {error, 0, chunk * step_, input, nonfinite};
  return false;
}

size_t TensorReader::input_stride() const {
  size_t widest = item_bytes(tensor_.output_type);
  for (const SourcePtr& s : tensor_.inputs) widest = std::max(widest, item_bytes(s->type()));
  return round_up(size_t(step_) * widest);
}

void TensorReader::keep_chunks(char* memory, size_t bytes) {
  kept_ = memory;
  const size_t fitting = memory ? bytes / (input_stride() * tensor_.inputs.size()) : 0;
  is_kept_.assign(std::min(fitting, size_t(chunks_)), 0);
}

Buffers* TensorReader::buffers(int worker) {
  Buffers& b = workers_[size_t(worker)];
  if (!b.inputs.empty()) return &b;
  const size_t n = size_t(step_);
  const size_t count = tensor_.inputs.size();
  size_t scratch_bytes = 0;
  for (const SourcePtr& s : tensor_.inputs)
    scratch_bytes = std::max(scratch_bytes, s->scratch_bytes(step_));
  const size_t stride = input_stride();
  const size_t words = round_up(n * 4);
  const size_t all_ranks = row_ > 0 ? words * size_t(branches_) : 0;
  const size_t rank_bytes = all_ranks + size_t(row_) * 16;
  char* start = pool_->get(first_worker_ + worker,
                           stride * (count + 1) + scratch_bytes + words + rank_bytes + 64);
  if (!start) return nullptr;
  b.start = start;
  b.held.assign(count, {0, 0});
  for (size_t k = 0; k < count; k++) b.inputs.push_back(start + stride * k);
  b.out = start + stride * count;
  b.sizes = reinterpret_cast<float*>(b.out + stride);
  b.ranks = reinterpret_cast<uint32_t*>(b.out + stride + words);
  b.rank_space = b.ranks + all_ranks / 4;
  b.scratch = b.out + stride + words + round_up(rank_bytes);
  b.mix_space.resize(size_t(branches_) * size_t(kMixBlock));
  return &b;
}

bool TensorReader::read(Buffers* b, const std::vector<size_t>& inputs, int64_t first, int64_t n) {
  const Reading reading{engine_.kernels, engine_.remote, engine_.wide_runs};
  for (size_t k : inputs) {
    Held& held = b->held[k];
    b->inputs[k] = b->start + input_stride() * k;
    if (held.first == first && held.elements == n) continue;
    char* to = b->start + input_stride() * k;
    const int error = tensor_.inputs[k]->read(reading, first, n, to, b->scratch);
    if (error) return fail(error, first / step_, int64_t(k), false);
    held = {first, n};
  }
  return true;
}

// Reads inputs of a chunk; those of a chunk that is to be kept go there.
bool TensorReader::read_chunk(Buffers* b, const std::vector<size_t>& inputs, int64_t chunk) {
  const size_t count = tensor_.inputs.size();
  const bool is_whole = inputs.size() == count;
  if (size_t(chunk) >= is_kept_.size() || (!is_whole && !is_kept_[size_t(chunk)]))
    return read(b, inputs, chunk * step_, length(chunk));
  const Reading reading{engine_.kernels, engine_.remote, engine_.wide_runs};
  for (size_t k : inputs) {
    char* to = kept_ + (size_t(chunk) * count + k) * input_stride();
    b->inputs[k] = to;
    if (is_kept_[size_t(chunk)]) continue;
    const int error =
        tensor_.inputs[k]->read(reading, chunk * step_, length(chunk), to, b->scratch);
    if (error) return fail(error, chunk, int64_t(k), false);
  }
  is_kept_[size_t(chunk)] = 1;
  return true;
}

bool TensorReader::read_all_inputs(Buffers* b, int64_t chunk) {
  std::vector<size_t> inputs;
  for (size_t k = 0; k < tensor_.inputs.size(); k++) inputs.push_back(k);
  return read_chunk(b, inputs, chunk);
}

void TensorReader::delta_sizes(Buffers* b, int ranking, int64_t first, int64_t n) const {
  engine_.kernels.delta_sizes(b->inputs.data(), types_.data(), branches_, ranking, first, n,
                              b->sizes);
}

// Returns the inputs that a set of rankings needs: the base, and the branches they rank (all for
// the variance).
std::vector<size_t> TensorReader::needed(const std::vector<int>& rankings) const {
  std::vector<bool> used(size_t(branches_) + 1, false);
  used[size_t(branches_)] = true;
  for (int ranking : rankings)
    for (int k = 0; k < branches_; k++)
      if (ranking == k || ranking == kVariance) used[size_t(k)] = true;
  std::vector<size_t> inputs;
  for (size_t k = 0; k < used.size(); k++)
    if (used[k]) inputs.push_back(k);
  return inputs;
}

bool TensorReader::scan(const std::vector<int>& wanted, const UseSizes& use) {
  const std::vector<size_t> inputs = needed(wanted);
  return for_each_chunk([&](Buffers* b, int worker, int64_t chunk) {
    const int64_t n = length(chunk);
    if (!read_chunk(b, inputs, chunk)) return false;
    for (int64_t first = 0; first < n; first += kScanBlock) {
      const int64_t m = std::min(kScanBlock, n - first);
      for (size_t i = 0; i < wanted.size(); i++) {
        if (i == 0 || wanted[i] != wanted[i - 1]) delta_sizes(b, wanted[i], first, m);
        use(worker, chunk, i, b->sizes, m);
      }
    }
    return true;
  });
}

bool TensorReader::sample(const std::vector<int>& wanted, std::vector<float>* samples) {
  const int64_t n = tensor_.elements;
  const bool whole = n <= kSampleRuns * kSampleLength;
  const int64_t length = std::min(whole ? step_ : std::min(kSampleLength, step_), n);
  const int64_t runs = whole ? chunks_ : kSampleRuns;
  const std::vector<size_t> inputs = needed(wanted);
  Buffers* b = buffers(0);
  if (!b) return fail(ENOMEM, 0, -1, false);
  for (int64_t r = 0; r < runs; r++) {
    const int64_t first = whole ? r * step_ : (n - length) / (runs - 1) * r;
    const int64_t m = std::min(length, n - first);
    if (!read(b, inputs, first, m)) return false;
    for (size_t i = 0; i < wanted.size(); i++) {
      delta_sizes(b, wanted[i], 0, m);
      samples[i].insert(samples[i].end(), b->sizes, b->sizes + m);
    }
  }
  return true;
}
