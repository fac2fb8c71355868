#include <algorithm>
#include <mutex>
#include <utility>

#include "engine/ranks.h"
#include "engine/streaming.h"
#include "engine/tensor_reader.h"

namespace {

class TensorMerge {
 public:
  TensorMerge(const Engine& engine, const Segment& tensor, const TensorRule& rule,
              const GramJob& grams, Pool* pool, int first_worker)
      : engine_(engine),
        tensor_(tensor),
        rule_(rule),
        grams_(grams),
        pool_(pool),
        reader_(engine, tensor, rule.row, pool, first_worker),
        branches_(reader_.branches()),
        weight_(rule.weight) {}

  MergeResult run() {
    if (find_cuts() && (!rule_.weigh_by_squares || weigh()) && (!rule_.restore_sizes || restore()))
      write();
    return reader_.result();
  }

 private:
  bool by_variance() const { return rule_.variance_share < 1.0; }

  bool find_cuts() {
    if (rule_.top.empty() && !by_variance()) return true;
    keep_chunks();
    if (!(by_variance() ? rank_variances() : rank_branches())) return false;
    const Sizes sizes{
        .elements = tensor_.elements,
        .chunks = reader_.chunks(),
        .chunk_elements = reader_.chunk_elements(),
        .threads = engine_.threads,
        .few_values = few_values(),
        .kernels = engine_.kernels,
        .scan = [this](const std::vector<int>& wanted,
                       const UseSizes& use) { return reader_.scan(wanted, use); },
        .sample = [this](const std::vector<int>& wanted,
                         std::vector<float>* out) { return reader_.sample(wanted, out); }};
    if (!find_thresholds(sizes, &thresholds_)) return false;
    for (size_t i = 0; i < thresholds_.size(); i += 2) {
      low_.push_back(thresholds_[i].value);
      high_.push_back(thresholds_[i + 1].value);
    }
    for (Threshold& t : thresholds_) spread_ties(&t);
    return true;
  }

  // A tensor of one chunk stays in its worker's buffers.
  void keep_chunks() {
    const size_t bytes = size_t(engine_.kept_bytes);
    if (reader_.chunks() > 1 && bytes)
      reader_.keep_chunks(pool_->get(engine_.threads, bytes), bytes);
  }

  // Differences of 16-bit floats take few values.
  bool few_values() const {
    bool few = !by_variance();
    for (DType t : reader_.types()) few &= item_bytes(t) == 2;
    return few;
  }

  void add_threshold(int ranking, int64_t rank) {
    thresholds_.push_back({ranking, rank, 0.0f, 0, {}});
  }

  // Per ranking one threshold of the elements that are kept, and one of those dropped from the top.
  bool rank_branches() {
    for (int k = 0; k < branches_; k++) {
      add_threshold(k, rule_.top[size_t(k)] + rule_.keep[size_t(k)]);
      add_threshold(k, rule_.top[size_t(k)]);
    }
    return true;
  }

  bool rank_variances() {
    std::vector<int64_t> above(size_t(reader_.chunks()), 0);
    const auto count = [&](int, int64_t chunk, size_t, const float* sizes, int64_t n) {
      int64_t more = 0, same = 0;
      engine_.kernels.count_sizes(sizes, n, 0.0f, &more, &same);
      above[size_t(chunk)] += more;
    };
    if (!reader_.scan({kVariance}, count)) return false;
    int64_t nonzero = 0;
    for (int64_t c : above) nonzero += c;
    add_threshold(kVariance, int64_t(double(nonzero) * rule_.variance_share));
    add_threshold(kVariance, 0);
    return true;
  }

  // Turns the ties that each chunk holds into those that it may keep: all ties less those of the
  // chunks before.
  static void spread_ties(Threshold* t) {
    int64_t left = t->ties;
    for (int64_t& c : t->chunk_ties) left -= std::exchange(c, std::max<int64_t>(left, 0));
  }

  MixRule mix_rule() const {
    const bool cut = !low_.empty();
    return {.branches = branches_,
            .weight = weight_.data(),
            .low = cut ? low_.data() : nullptr,
            .high = cut ? high_.data() : nullptr,
            .by_variance = by_variance(),
            .stream = rule_.stream.empty() ? nullptr : rule_.stream.data(),
            .density = rule_.density.data(),
            .epsilon = rule_.epsilon.data(),
            .divide = rule_.divide,
            .enlarge = enlarge_.empty() ? nullptr : enlarge_.data(),
            .row = rule_.row,
            .elect = rule_.elect,
            .normalize = rule_.normalize,
            .plain_votes = rule_.weigh_by_squares,
            .scale = rule_.scale};
  }

  // Returns, branch by branch, the ties that a chunk may still keep (which = 0) or drop (which =
  // 1).
  std::vector<int64_t> ties(int64_t chunk, size_t which) const {
    const size_t rankings = thresholds_.size() / 2;
    std::vector<int64_t> left(std::max(size_t(branches_), rankings), 0);
    for (size_t i = 0; i < rankings; i++)
      left[i] = thresholds_[2 * i + which].chunk_ties[size_t(chunk)];
    return left;
  }

  // Weighs branches by the mean squares of their kept deltas, as shares of 1; sums chunks in their
  // order.
  bool weigh() {
    const MixRule rule = mix_rule();
    const int64_t chunks = reader_.chunks();
    std::vector<double> squares(size_t(chunks) * size_t(branches_), 0.0);
    const auto sum_squares = [&](Buffers* b, int, int64_t chunk) {
      if (!reader_.read_all_inputs(b, chunk)) return false;
      std::vector<int64_t> low = ties(chunk, 0);
      std::vector<int64_t> high = ties(chunk, 1);
      std::vector<double> lanes(size_t(branches_) * 8);
      engine_.kernels.kept_squares(rule, b->inputs.data(), reader_.types().data(),
                                   reader_.length(chunk), low.data(), high.data(),
                                   squares.data() + chunk * branches_, lanes.data());
      return true;
    };
    if (!reader_.for_each_chunk(sum_squares)) return false;
    double total = 0.0;
    for (int k = 0; k < branches_; k++) {
      weight_[size_t(k)] = 0.0;
      for (int64_t c = 0; c < chunks; c++) weight_[size_t(k)] += squares[size_t(c * branches_ + k)];
      total += weight_[size_t(k)];
    }
    for (double& w : weight_) w = total > 0.0 ? w / total : 1.0 / branches_;
    return true;
  }

  // Sets the factors that restore the sum of the sizes of every branch's deltas; sums chunks in
  // their order. Sums below 1e-7 give the factor 1.
  bool restore() {
    if (low_.empty()) return true;  // all deltas are kept
    const MixRule rule = mix_rule();
    const int64_t chunks = reader_.chunks();
    const size_t count = size_t(branches_);
    std::vector<double> sums(size_t(chunks) * count * 2, 0.0);
    const auto add = [&](Buffers* b, int, int64_t chunk) {
      if (!reader_.read_all_inputs(b, chunk)) return false;
      std::vector<int64_t> low = ties(chunk, 0);
      std::vector<int64_t> high = ties(chunk, 1);
      std::vector<double> lanes(count * 16);
      engine_.kernels.kept_sizes(rule, b->inputs.data(), reader_.types().data(),
                                 reader_.length(chunk), low.data(), high.data(),
                                 sums.data() + size_t(chunk) * count * 2, lanes.data());
      return true;
    };
    if (!reader_.for_each_chunk(add)) return false;
    for (size_t k = 0; k < count; k++) {
      double all = 0.0;
      double kept = 0.0;
      for (size_t c = 0; c < size_t(chunks); c++) {
        all += sums[c * count * 2 + k];
        kept += sums[c * count * 2 + count + k];
      }
      enlarge_.push_back(all < 1e-7 || kept < 1e-7 ? 1.0 : all / kept);
    }
    return true;
  }

  void rank_rows(Buffers* b, int64_t n) const {
    for (int k = 0; k < branches_; k++) {
      reader_.delta_sizes(b, k, 0, n);
      for (int64_t at = 0; at < n; at += rule_.row)
        rank_row(b->sizes + at, rule_.row, b->ranks + k * n + at, b->rank_space);
    }
  }

  void take_grams(Buffers* b, int64_t chunk) const {
    std::vector<double> space(gram_scratch(grams_.branches));
    const size_t size = size_t(grams_.branches) * size_t(grams_.branches);
    const int64_t step = reader_.chunk_elements();
    for (size_t p = 0; p < grams_.pieces.size(); p++) {
      const Piece& piece = grams_.pieces[p];
      if (piece.first / step != chunk) continue;
      engine_.kernels.delta_gram(b->inputs.data(), reader_.types().data(), grams_.branches,
                                 grams_.from_base, piece.first - chunk * step, piece.elements,
                                 grams_.gram + p * size, space.data());
    }
  }

  void write() {
    const MixRule rule = mix_rule();
    const int64_t item = int64_t(item_bytes(tensor_.output_type));
    reader_.for_each_chunk([&](Buffers* b, int, int64_t chunk) {
      const int64_t n = reader_.length(chunk);
      const int64_t first = chunk * reader_.chunk_elements();
      if (!reader_.read_all_inputs(b, chunk)) return false;
      if (rule_.row > 0) rank_rows(b, n);
      take_grams(b, chunk);
      std::vector<int64_t> low = ties(chunk, 0);
      std::vector<int64_t> high = ties(chunk, 1);
      const bool finite = engine_.kernels.mix_deltas(
          rule, b->inputs.data(), reader_.types().data(), first, n, low.data(), high.data(),
          rule_.row > 0 ? b->ranks : nullptr, b->out, tensor_.output_type, b->mix_space.data());
      if (!finite && !engine_.allow_nonfinite) return reader_.fail(0, chunk, -1, true);
      const int64_t at = tensor_.output_offset + first * item;
      const int error = write_output(engine_, tensor_, b->out, n * item, at);
      if (error) return reader_.fail(error, chunk, -1, false);
      __atomic_fetch_add(engine_.elements_done, n, __ATOMIC_RELAXED);
      return true;
    });
  }

  const Engine& engine_;
  const Segment& tensor_;
  const TensorRule& rule_;
  const GramJob& grams_;
  Pool* const pool_;
  TensorReader reader_;
  const int branches_;
  std::vector<double> weight_;
  std::vector<double> enlarge_;        // factor of each branch, or empty
  std::vector<Threshold> thresholds_;  // pairs, as rank_branches adds them
  std::vector<float> low_, high_;
};

// The matrices of one of a job's tensors.
GramJob grams_of(const GramJob& grams, int64_t tensor) {
  const auto before = [](const Piece& p, int64_t segment) { return p.segment < segment; };
  const auto begin = std::lower_bound(grams.pieces.begin(), grams.pieces.end(), tensor, before);
  const auto end = std::lower_bound(begin, grams.pieces.end(), tensor + 1, before);
  GramJob job = grams;
  job.pieces.assign(begin, end);
  job.gram += (begin - grams.pieces.begin()) * grams.branches * grams.branches;
  return job;
}

}  // namespace

MergeResult merge_deltas(const Engine& engine, const std::vector<Segment>& tensors,
                         const std::vector<TensorRule>& rules, const GramJob& grams) {
  Pool pool(engine.threads + 1);  // the last part holds kept chunks
  std::mutex mutex;
  MergeResult first_error{0, -1, 0, -1, false};
  const auto merge = [&](const Engine& workers, size_t t, int worker) {
    const GramJob own = grams_of(grams, int64_t(t));
    MergeResult result = TensorMerge(workers, tensors[t], rules[t], own, &pool, worker).run();
    if (result.segment < 0) return true;
    result.segment = int64_t(t);
    const std::lock_guard<std::mutex> lock(mutex);
    if (first_error.segment < 0) first_error = result;
    return false;
  };
  std::vector<size_t> small;  // a worker merges the whole tensor: threads of its own cost too much
  for (size_t t = 0; t < tensors.size(); t++) {
    if (tensors[t].elements <= engine.chunk_elements)
      small.push_back(t);
    else if (!merge(engine, t, 0))
      return first_error;
  }
  Engine single = engine;
  single.threads = 1;
  for_each_item(int64_t(small.size()), engine.threads,
                [&](int worker, int64_t i) { return merge(single, small[size_t(i)], worker); });
  return first_error;
}
