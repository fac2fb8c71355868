#include <algorithm>
#include <functional>

#include "elements/elements.h"
#include "engine/ranks.h"
#include "engine/tensor_reader.h"

namespace {

const int64_t kSorted = 1 << 16;  // elements of a tensor whose quantiles are taken by sorting

class ElementMerge {
 public:
  ElementMerge(const Engine& engine, const Segment& tensor, const ElementRule& rule)
      : engine_(engine),
        tensor_(tensor),
        rule_(rule),
        pool_(engine.threads),
        reader_(engine, tensor, rule.row, &pool_, 0) {}

  MergeResult run() {
    switch (rule_.kind) {
      case ElementKind::near: write_near(); break;
      case ElementKind::active: write_active(); break;
      case ElementKind::important: write_important(); break;
    }
    return reader_.result();
  }

 private:
  // mix(buffers, n) fills the output of a chunk and returns whether it is finite.
  void write(const std::function<bool(Buffers*, int64_t)>& mix) {
    const int64_t item = int64_t(item_bytes(tensor_.output_type));
    reader_.for_each_chunk([&](Buffers* b, int, int64_t chunk) {
      const int64_t n = reader_.length(chunk);
      if (!reader_.read_all_inputs(b, chunk)) return false;
      if (!mix(b, n) && !engine_.allow_nonfinite) return reader_.fail(0, chunk, -1, true);
      const int64_t at = tensor_.output_offset + chunk * reader_.chunk_elements() * item;
      const int error = write_output(engine_, tensor_, b->out, n * item, at);
      if (error) return reader_.fail(error, chunk, -1, false);
      __atomic_fetch_add(engine_.elements_done, n, __ATOMIC_RELAXED);
      return true;
    });
  }

  void write_near() {
    write([&](Buffers* b, int64_t n) {
      return engine_.kernels.mix_near(b->inputs.data(), reader_.types().data(), rule_.t, n, b->out,
                                      tensor_.output_type);
    });
  }

  void write_active() {
    const int count = reader_.branches();
    std::vector<double> factor(size_t(count), 1.0);
    if (rule_.r != 0.0 && !boost(&factor)) return;
    write([&](Buffers* b, int64_t n) {
      return engine_.kernels.mix_active(b->inputs.data(), reader_.types().data(), count,
                                        rule_.epsilon, factor.data(), n, b->out,
                                        tensor_.output_type, b->mix_space.data());
    });
  }

  // factor_k = 1 + r clip(shared_k / max(unique_k, epsilon), 0, alpha)
  bool boost(std::vector<double>* factor) {
    const size_t count = factor->size();
    std::vector<int64_t> counts(size_t(reader_.chunks()) * count * 2, 0);
    const auto tally = [&](Buffers* b, int, int64_t chunk) {
      if (!reader_.read_all_inputs(b, chunk)) return false;
      int64_t* here = counts.data() + size_t(chunk) * count * 2;
      engine_.kernels.tally_active(b->inputs.data(), reader_.types().data(), int(count),
                                   rule_.epsilon, reader_.length(chunk), here, here + count,
                                   b->mix_space.data());
      return true;
    };
    if (!reader_.for_each_chunk(tally)) return false;
    for (size_t k = 0; k < count; k++) {
      int64_t shared = 0;
      int64_t unique = 0;
      for (size_t c = 0; c < size_t(reader_.chunks()); c++) {
        shared += counts[c * count * 2 + k];
        unique += counts[c * count * 2 + count + k];
      }
      const double ratio = double(shared) / std::max(double(unique), rule_.epsilon);
      (*factor)[k] = 1.0 + rule_.r * std::clamp(ratio, 0.0, rule_.alpha);
    }
    return true;
  }

  // Fills b->sizes with the importance of the first n elements in the buffers, row by row.
  bool take_importance(Buffers* b, int64_t n) const {
    std::vector<double> scratch(size_t(rule_.row) * 4);
    bool finite = true;
    for (int64_t at = 0; at < n; at += rule_.row)
      finite &= engine_.kernels.row_importance(b->inputs.data(), reader_.types().data(), at,
                                               std::min(rule_.row, n - at), b->sizes + at,
                                               scratch.data());
    return finite;
  }

  void write_important() {
    double threshold = 0.0;
    if (!(tensor_.elements <= kSorted ? sort_quantiles(&threshold) : find_quantiles(&threshold)))
      return;
    write([&](Buffers* b, int64_t n) {
      const bool finite = take_importance(b, n);
      return engine_.kernels.mix_important(b->inputs.data(), reader_.types().data(), b->sizes,
                                           threshold, n, b->out, tensor_.output_type) &&
             finite;
    });
  }

  // Index of a quantile among the sorted sizes.
  int64_t place(double share) const { return int64_t(share * double(tensor_.elements - 1)); }

  static double reach(double low, double middle, double high) {
    return middle + 1.5 * (high - low);
  }

  bool sort_quantiles(double* threshold) {
    std::vector<float> all(size_t(tensor_.elements));
    const auto collect = [&](Buffers* b, int, int64_t chunk) {
      const int64_t n = reader_.length(chunk);
      if (!reader_.read_all_inputs(b, chunk)) return false;
      take_importance(b, n);
      std::copy(b->sizes, b->sizes + n, all.begin() + chunk * reader_.chunk_elements());
      return true;
    };
    if (!reader_.for_each_chunk(collect)) return false;
    std::sort(all.begin(), all.end(), [](float a, float b) {
      return a < b || (a == a && b != b);  // NaN last
    });
    *threshold = reach(double(all[size_t(place(0.25))]), double(all[size_t(place(0.5))]),
                       double(all[size_t(place(0.75))]));
    return true;
  }

  bool find_quantiles(double* threshold) {
    const auto scan = [&](const std::vector<int>& wanted, const UseSizes& use) {
      return reader_.for_each_chunk([&](Buffers* b, int worker, int64_t chunk) {
        if (!reader_.read_all_inputs(b, chunk)) return false;
        take_importance(b, reader_.length(chunk));
        for (size_t i = 0; i < wanted.size(); i++)
          use(worker, chunk, i, b->sizes, reader_.length(chunk));
        return true;
      });
    };
    const auto sample = [&](const std::vector<int>&, std::vector<float>* samples) {
      return sample_rows(samples);
    };
    const Sizes sizes{.elements = tensor_.elements,
                      .chunks = reader_.chunks(),
                      .chunk_elements = reader_.chunk_elements(),
                      .threads = engine_.threads,
                      .few_values = false,
                      .kernels = engine_.kernels,
                      .scan = scan,
                      .sample = sample};
    std::vector<Threshold> found;
    for (const double share : {0.25, 0.5, 0.75})
      found.push_back({0, tensor_.elements - place(share), 0.0f, 0, {}});
    if (!find_thresholds(sizes, &found)) return false;
    *threshold = reach(double(found[0].value), double(found[1].value), double(found[2].value));
    return true;
  }

  // Takes about 4096 sizes from each of at most 16 chunks, spread evenly.
  bool sample_rows(std::vector<float>* samples) {
    const int64_t stride = (reader_.chunks() + 15) / 16;
    std::vector<std::vector<float>> parts(size_t(reader_.chunks()));
    const auto take = [&](Buffers* b, int, int64_t chunk) {
      if (chunk % stride != 0) return true;
      const int64_t n = reader_.length(chunk);
      if (!reader_.read_all_inputs(b, chunk)) return false;
      take_importance(b, n);
      const int64_t step = std::max<int64_t>(1, n / 4096);
      for (int64_t i = 0; i < n; i += step) parts[size_t(chunk)].push_back(b->sizes[i]);
      return true;
    };
    if (!reader_.for_each_chunk(take)) return false;
    for (const std::vector<float>& part : parts)
      samples->insert(samples->end(), part.begin(), part.end());
    return true;
  }

  const Engine& engine_;
  const Segment& tensor_;
  const ElementRule& rule_;
  Pool pool_;
  TensorReader reader_;
};

}  // namespace

MergeResult merge_elements(const Engine& engine, const Segment& tensor, const ElementRule& rule) {
  return ElementMerge(engine, tensor, rule).run();
}
