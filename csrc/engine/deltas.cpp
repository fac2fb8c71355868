#include <algorithm>
#include <cerrno>
#include <mutex>
#include <utility>

#include "engine/ranks.h"
#include "engine/streaming.h"
#include "engine/workers.h"

namespace {

const int64_t kSamplePlaces = 64, kSampleRun = 256;

// Buffers of one worker: inputs, output, what a source needs on its way in, sizes, ranks.
struct Buffers {
  Memory memory;
  std::vector<const void*> inputs;
  char *out, *scratch;
  float* sizes;
  uint32_t *ranks, *rank_space;
  std::vector<double> mix_space;
};

class TensorMerge {
 public:
  TensorMerge(const Engine& engine, const Segment& tensor, const TensorRule& rule,
              const GramJob& grams)
      : engine_(engine),
        tensor_(tensor),
        rule_(rule),
        grams_(grams),
        branches_(int(tensor.inputs.size()) - 1),
        step_(engine.chunk_elements),
        workers_(size_t(engine.threads)),
        weight_(rule.weight) {
    if (rule.row > 0) step_ = std::max(rule.row, step_ / rule.row * rule.row);
    step_ = std::min(step_, tensor.elements);
    chunks_ = (tensor.elements + step_ - 1) / step_;
    for (const Source& s : tensor.inputs) types_.push_back(s.type());
  }

  MergeResult run() {
    if (find_cuts() && (!rule_.weigh_by_squares || weigh())) write();
    return result_;
  }

 private:
  bool fail(int error, int64_t chunk, int64_t input, bool nonfinite) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (result_.segment < 0) result_ = {error, 0, chunk * step_, input, nonfinite};
    return false;
  }

  int64_t length(int64_t chunk) const { return std::min(step_, tensor_.elements - chunk * step_); }

  Buffers* buffers(int worker) {
    Buffers& b = workers_[size_t(worker)];
    if (b.memory) return &b;
    const size_t n = size_t(step_), count = tensor_.inputs.size();
    size_t widest = item_bytes(tensor_.output_type);
    bool made = false;
    for (const Source& s : tensor_.inputs) {
      widest = std::max(widest, item_bytes(s.type()));
      made |= !s.scales.empty() || !s.low_rank.empty();
    }
    const size_t stride = (n * widest + 63) / 64 * 64, words = (n * 4 + 63) / 64 * 64;
    const size_t rank_bytes =
        rule_.row > 0 ? words * size_t(branches_) + size_t(rule_.row) * 16 : 0;
    b.memory = page_aligned(stride * (count + 1) + (made ? n * 16 : 0) + words + rank_bytes + 64);
    if (!b.memory) return nullptr;
    char* p = b.memory.get();
    for (size_t k = 0; k < count; k++) b.inputs.push_back(p + stride * k);
    b.out = p + stride * count;
    b.sizes = reinterpret_cast<float*>(b.out + stride);
    b.ranks = reinterpret_cast<uint32_t*>(b.out + stride + words);
    b.rank_space = b.ranks + (rule_.row > 0 ? words / 4 * size_t(branches_) : 0);
    b.scratch = b.out + stride + words + (rank_bytes + 63) / 64 * 64;
    b.mix_space.resize(size_t(branches_) * size_t(kMixBlock));
    return &b;
  }

  // Elements of one input into its buffer, `place` elements from the buffer's start.
  int read(Buffers* b, size_t input, int64_t first, int64_t n, int64_t place = 0) {
    const Source& s = tensor_.inputs[input];
    char* to = static_cast<char*>(const_cast<void*>(b->inputs[input])) +
               size_t(place) * item_bytes(s.type());
    return read_source(engine_.level, engine_.remote, s, first, n, to, b->scratch);
  }

  // The inputs that a set of rankings needs: the base, and the branches they rank (all for the variance).
  std::vector<size_t> needed(const std::vector<int>& rankings) const {
    std::vector<bool> used(size_t(branches_) + 1, false);
    used[size_t(branches_)] = true;
    for (int which : rankings)
      for (int k = 0; k < branches_; k++)
        if (which == k || which == kVariance) used[size_t(k)] = true;
    std::vector<size_t> inputs;
    for (size_t k = 0; k < used.size(); k++)
      if (used[k]) inputs.push_back(k);
    return inputs;
  }

  bool scan(const std::vector<int>& wanted, const UseSizes& use) {
    const std::vector<size_t> inputs = needed(wanted);
    for_each_item(chunks_, engine_.threads, [&](int worker, int64_t chunk) {
      Buffers* b = buffers(worker);
      if (!b) return fail(ENOMEM, chunk, -1, false);
      const int64_t n = length(chunk);
      for (size_t k : inputs)
        if (const int e = read(b, k, chunk * step_, n)) return fail(e, chunk, int64_t(k), false);
      for (size_t i = 0; i < wanted.size(); i++) {
        if (i == 0 || wanted[i] != wanted[i - 1])
          engine_.level.delta_sizes(b->inputs.data(), types_.data(), branches_, wanted[i], 0, n,
                                    b->sizes);
        use(worker, chunk, i, b->sizes, n);
      }
      return true;
    });
    return result_.segment < 0;
  }

  // Runs of elements spread evenly over the tensor; all of it if it is small.
  bool sample(const std::vector<int>& wanted, std::vector<float>* samples) {
    const int64_t n = tensor_.elements;
    const bool whole = n <= kSamplePlaces * kSampleRun;
    const int64_t run = std::min(whole ? step_ : std::min(kSampleRun, step_), n),
                  places = whole ? chunks_ : kSamplePlaces;
    const std::vector<size_t> inputs = needed(wanted);
    Buffers* b = buffers(0);
    if (!b) return fail(ENOMEM, 0, -1, false);
    for (int64_t p = 0; p < places; p++) {
      const int64_t first = whole ? p * step_ : (n - run) / (places - 1) * p,
                    m = std::min(run, n - first);
      for (size_t k : inputs)
        if (const int e = read(b, k, first, m)) return fail(e, first / step_, int64_t(k), false);
      for (size_t i = 0; i < wanted.size(); i++) {
        engine_.level.delta_sizes(b->inputs.data(), types_.data(), branches_, wanted[i], 0, m,
                                  b->sizes);
        samples[i].insert(samples[i].end(), b->sizes, b->sizes + m);
      }
    }
    return true;
  }

  bool find_cuts() {
    const bool by_variance = rule_.variance_share < 1.0;
    if (rule_.top.empty() && !by_variance) return true;
    bool few_values = !by_variance;
    for (DType t : types_) few_values &= item_bytes(t) == 2;
    const Sizes sizes{
        tensor_.elements,
        chunks_,
        step_,
        engine_.threads,
        few_values,
        engine_.level,
        [this](const std::vector<int>& wanted, const UseSizes& use) { return scan(wanted, use); },
        [this](const std::vector<int>& wanted, std::vector<float>* out) {
          return sample(wanted, out);
        }};
    if (by_variance) {
      std::vector<int64_t> above(size_t(chunks_), 0), equal(size_t(chunks_), 0);
      if (!scan({kVariance}, [&](int, int64_t chunk, size_t, const float* x, int64_t n) {
            engine_.level.count_sizes(x, n, 0.0f, &above[size_t(chunk)], &equal[size_t(chunk)]);
          }))
        return false;
      int64_t nonzero = 0;
      for (int64_t c : above) nonzero += c;
      thresholds_.push_back(
          {kVariance, int64_t(double(nonzero) * rule_.variance_share), 0.0f, 0, {}});
      thresholds_.push_back({kVariance, 0, 0.0f, 0, {}});
    }
    for (int k = 0; k < branches_ && !by_variance; k++) {
      thresholds_.push_back({k, rule_.top[size_t(k)] + rule_.keep[size_t(k)], 0.0f, 0, {}});
      thresholds_.push_back({k, rule_.top[size_t(k)], 0.0f, 0, {}});
    }
    if (!find_thresholds(sizes, &thresholds_)) return false;
    for (size_t i = 0; i < thresholds_.size(); i += 2) {
      low_.push_back(thresholds_[i].value);
      high_.push_back(thresholds_[i + 1].value);
    }
    for (Threshold& t :
         thresholds_) {  // what a chunk still has to give: the ties less those of the chunks before
      int64_t left = t.ties;
      for (int64_t& c : t.chunk_ties) left -= std::exchange(c, std::max<int64_t>(left, 0));
    }
    return true;
  }

  MixRule mix_rule() const {
    const bool cut = !low_.empty(), chance = !rule_.stream.empty();
    return {branches_,
            weight_.data(),
            cut ? low_.data() : nullptr,
            cut ? high_.data() : nullptr,
            rule_.variance_share < 1.0,
            chance ? rule_.stream.data() : nullptr,
            rule_.density.data(),
            rule_.epsilon.data(),
            rule_.row,
            rule_.elect,
            rule_.normalize,
            rule_.weigh_by_squares,
            rule_.scale};
  }

  // The ties that a chunk still may keep (0) or drop (1), branch by branch.
  std::vector<int64_t> ties(int64_t chunk, size_t which) const {
    std::vector<int64_t> left(std::max(size_t(branches_), thresholds_.size() / 2), 0);
    for (size_t i = 0; i < thresholds_.size() / 2; i++)
      left[i] = thresholds_[2 * i + which].chunk_ties[size_t(chunk)];
    return left;
  }

  bool read_all_inputs(Buffers* b, int64_t chunk, int64_t n) {
    for (size_t k = 0; k < tensor_.inputs.size(); k++)
      if (const int e = read(b, k, chunk * step_, n)) return fail(e, chunk, int64_t(k), false);
    return true;
  }

  // Weights by the kept deltas' mean squares, as shares of 1; summed over chunks in their order.
  bool weigh() {
    const MixRule rule = mix_rule();
    std::vector<double> squares(size_t(chunks_) * size_t(branches_), 0.0);
    for_each_item(chunks_, engine_.threads, [&](int worker, int64_t chunk) {
      Buffers* b = buffers(worker);
      if (!b) return fail(ENOMEM, chunk, -1, false);
      const int64_t n = length(chunk);
      if (!read_all_inputs(b, chunk, n)) return false;
      std::vector<int64_t> low = ties(chunk, 0), high = ties(chunk, 1);
      std::vector<double> lanes(size_t(branches_) * 8);
      engine_.level.kept_squares(rule, b->inputs.data(), types_.data(), n, low.data(), high.data(),
                                 squares.data() + chunk * branches_, lanes.data());
      return true;
    });
    if (result_.segment >= 0) return false;
    double total = 0.0;
    for (int k = 0; k < branches_; k++) {
      weight_[size_t(k)] = 0.0;
      for (int64_t c = 0; c < chunks_; c++)
        weight_[size_t(k)] += squares[size_t(c * branches_ + k)];
      total += weight_[size_t(k)];
    }
    for (double& w : weight_) w = total > 0.0 ? w / total : 1.0 / branches_;
    return true;
  }

  void rank_rows(Buffers* b, int64_t n) {
    for (int k = 0; k < branches_; k++) {
      engine_.level.delta_sizes(b->inputs.data(), types_.data(), branches_, k, 0, n, b->sizes);
      for (int64_t at = 0; at < n; at += rule_.row)
        rank_row(b->sizes + at, rule_.row, b->ranks + k * n + at, b->rank_space);
    }
  }

  void take_gram(Buffers* b, int64_t chunk) {
    std::vector<double> space(gram_scratch(grams_.branches));
    const size_t size = size_t(grams_.branches) * size_t(grams_.branches);
    for (size_t p = 0; p < grams_.pieces.size(); p++)
      if (grams_.pieces[p].first / step_ == chunk)
        engine_.level.delta_gram(b->inputs.data(), types_.data(), grams_.branches, grams_.from_base,
                                 grams_.pieces[p].first - chunk * step_, grams_.pieces[p].elements,
                                 grams_.gram + p * size, space.data());
  }

  void write() {
    const MixRule rule = mix_rule();
    const size_t item = item_bytes(tensor_.output_type);
    for_each_item(chunks_, engine_.threads, [&](int worker, int64_t chunk) {
      Buffers* b = buffers(worker);
      if (!b) return fail(ENOMEM, chunk, -1, false);
      const int64_t n = length(chunk);
      if (!read_all_inputs(b, chunk, n)) return false;
      if (rule_.row > 0) rank_rows(b, n);
      take_gram(b, chunk);
      std::vector<int64_t> low = ties(chunk, 0), high = ties(chunk, 1);
      const bool finite = engine_.level.mix_deltas(
          rule, b->inputs.data(), types_.data(), chunk * step_, n, low.data(), high.data(),
          rule_.row > 0 ? b->ranks : nullptr, b->out, tensor_.output_type, b->mix_space.data());
      if (!finite && !engine_.allow_nonfinite) return fail(0, chunk, -1, true);
      const int64_t at = tensor_.output_offset + chunk * step_ * int64_t(item);
      if (const int e =
              write_all(tensor_.output_fd, b->out, size_t(n) * item, at, engine_.write_early))
        return fail(e, chunk, -1, false);
      __atomic_fetch_add(engine_.elements_done, n, __ATOMIC_RELAXED);
      return true;
    });
  }

  const Engine& engine_;
  const Segment& tensor_;
  const TensorRule& rule_;
  const GramJob& grams_;
  const int branches_;
  int64_t step_, chunks_;
  std::vector<Buffers> workers_;
  std::vector<DType> types_;
  std::vector<double> weight_;
  std::vector<Threshold>
      thresholds_;  // per ranking: of what is kept, of what is dropped from the top
  std::vector<float> low_, high_;
  std::mutex mutex_;
  MergeResult result_{0, -1, 0, -1, false};
};

}  // namespace

MergeResult merge_deltas(const Engine& engine, const Segment& tensor, const TensorRule& rule,
                         const GramJob& grams) {
  return TensorMerge(engine, tensor, rule, grams).run();
}
