#include "engine/ranks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "engine/workers.h"

namespace {

const int64_t kBins = 8192;
const uint32_t kEnd = 0x80000000u;  // above the bits of every size

uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

float size_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// The search for one threshold. The bits of its value lie in [low, high).
struct Search {
  Threshold* threshold;
  uint32_t low, high;
  uint32_t try_low, try_high;  // range that the sample suggests
  // Range that the next pass cuts into bins; empty: it tests only the guess.
  uint32_t look_low, look_high;
  bool exact;
};

// Guesses the value from a sample, and a range for the case that the guess is wrong.
void guess(std::vector<float>* sample, int64_t elements, bool few_values, Search* s) {
  const int64_t m = int64_t(sample->size());
  const double share = double(s->threshold->rank) / double(elements);
  const double middle = share * double(m);
  const double spread = 4.0 * std::sqrt(share * (1.0 - share) * double(m)) + 2.0;
  const auto at = [&](double position) {
    const auto wanted = sample->begin() + std::clamp(int64_t(position), int64_t(0), m - 1);
    std::nth_element(sample->begin(), wanted, sample->end(),
                     [](float a, float b) { return bits_of(a) > bits_of(b); });
    return *wanted;
  };
  s->threshold->value = at(std::ceil(middle) - 1);
  s->try_low = middle + spread >= double(m) ? 0 : bits_of(at(middle + spread));
  s->try_high = middle - spread < 0 ? kEnd : bits_of(at(middle - spread)) + 1;
  if (few_values) return;
  s->look_low = s->try_low;
  s->look_high = s->try_high;
}

// Counts of one worker for one search.
struct Tally {
  int64_t above_value = 0, equal = 0, above_look = 0;
  std::vector<int64_t> bins;
};

int bin_shift(const Search& s) {
  int shift = 0;
  while ((int64_t(s.look_high - s.look_low - 1) >> shift) >= kBins) shift++;
  return shift;
}

// Applies the counts of a pass: the guess was right, or the range becomes narrower.
void conclude(const Tally& t, Search* s) {
  Threshold* threshold = s->threshold;
  const int64_t rank = threshold->rank;
  const uint32_t value = bits_of(threshold->value);
  threshold->ties = rank - t.above_value;
  s->exact = t.above_value < rank && rank <= t.above_value + t.equal;
  if (s->exact) return;
  if (rank <= t.above_value)
    s->low = std::max(s->low, value + 1);
  else
    s->high = std::min(s->high, value);
  if (s->look_low == s->look_high) {
    s->look_low = std::max(s->low, s->try_low);
    s->look_high = std::min(s->high, s->try_high);
    if (s->look_low < s->look_high) return;
    s->look_low = s->low;
    s->look_high = s->high;
    return;
  }
  int64_t above = t.above_look;
  int64_t here = 0;
  int64_t bin = kBins - 1;
  const int shift = bin_shift(*s);
  for (; bin >= 0 && rank > above; bin--) {
    here = t.bins[size_t(bin)];
    if (rank <= above + here) break;
    above += here;
  }
  if (rank <= t.above_look) {
    s->low = std::max(s->low, s->look_high);
  } else if (bin < 0) {
    s->high = std::min(s->high, s->look_low);
  } else {
    const uint32_t start = s->look_low + uint32_t(bin << shift);
    s->high = std::min(s->high, start + (1u << shift));
    s->low = std::max(s->low, start);
    if (shift == 0 && here == rank - above) {  // the value, and all of its elements
      threshold->value = size_of(start);
      threshold->ties = here;
      std::fill(threshold->chunk_ties.begin(), threshold->chunk_ties.end(), 0);
      s->exact = true;
      return;
    }
  }
  s->look_low = s->low;
  s->look_high = s->high;
  // Differences of 16-bit floats end in zeros, so the start of a bin is its likely value.
  threshold->value = size_of(s->low);
}

// Passes once over all sizes; counts those above and at every guess, and in bins around it.
bool survey(const Sizes& sizes, const std::vector<Search*>& searches) {
  std::vector<std::vector<Tally>> tallies(size_t(sizes.threads),
                                          std::vector<Tally>(searches.size()));
  std::vector<std::vector<uint32_t>> picked(static_cast<size_t>(sizes.threads));
  std::vector<int> wanted;
  for (Search* s : searches) {
    wanted.push_back(s->threshold->ranking);
    s->threshold->chunk_ties.assign(size_t(sizes.chunks), 0);
  }
  const auto count = [&](int worker, int64_t chunk, size_t index, const float* x, int64_t n) {
    const Search& s = *searches[index];
    Tally& t = tallies[size_t(worker)][index];
    std::vector<uint32_t>& buffer = picked[size_t(worker)];
    buffer.resize(size_t(sizes.chunk_elements + 16));
    t.bins.resize(size_t(kBins));
    int64_t above = 0, equal = 0;
    sizes.kernels.count_sizes(x, n, s.threshold->value, &above, &equal);
    t.above_value += above;
    t.equal += equal;
    s.threshold->chunk_ties[size_t(chunk)] += equal;
    if (s.look_low == s.look_high) return;  // tests only the guess
    const int64_t num_picked =
        sizes.kernels.pick_sizes(x, n, s.look_low, s.look_high, buffer.data(), &above);
    t.above_look += above;
    const int shift = bin_shift(s);
    for (int64_t i = 0; i < num_picked; i++)
      t.bins[size_t((buffer[size_t(i)] - s.look_low) >> shift)]++;
  };
  if (!sizes.scan(wanted, count)) return false;
  for (size_t i = 0; i < searches.size(); i++) {
    Tally sum;
    sum.bins.resize(size_t(kBins));
    for (const std::vector<Tally>& worker : tallies) {
      const Tally& tally = worker[i];
      sum.above_value += tally.above_value;
      sum.equal += tally.equal;
      sum.above_look += tally.above_look;
      for (size_t bin = 0; bin < tally.bins.size(); bin++) sum.bins[bin] += tally.bins[bin];
    }
    conclude(sum, searches[i]);
  }
  return true;
}

}  // namespace

bool find_thresholds(const Sizes& sizes, std::vector<Threshold>* thresholds) {
  std::vector<Search> all;
  std::vector<int> rankings;
  for (Threshold& t : *thresholds) {
    t.chunk_ties.assign(size_t(sizes.chunks), 0);
    const bool none = t.rank <= 0, every = t.rank >= sizes.elements;
    t.value = none ? size_of(kNoSize) : -1.0f;  // nothing, or everything, lies above
    t.ties = 0;
    if (none || every) continue;
    all.push_back({&t, 0, kEnd, 0, kEnd, 0, 0, false});
    if (rankings.empty() || rankings.back() != t.ranking) rankings.push_back(t.ranking);
  }
  if (all.empty()) return true;
  std::vector<std::vector<float>> samples(rankings.size());
  if (!sizes.sample(rankings, samples.data())) return false;
  for_each_item(int64_t(rankings.size()), sizes.threads, [&](int, int64_t i) {
    for (Search& s : all)
      if (s.threshold->ranking == rankings[size_t(i)])
        guess(&samples[size_t(i)], sizes.elements, sizes.few_values, &s);
    return true;
  });
  while (true) {
    std::vector<Search*> pending;
    for (Search& s : all)
      if (!s.exact) pending.push_back(&s);
    if (pending.empty()) return true;
    if (!survey(sizes, pending)) return false;
  }
}

void rank_row(const float* sizes, int64_t n, uint32_t* ranks, uint32_t* space) {
  uint32_t* keys = space;
  uint32_t* order = space + n;
  uint32_t* next_keys = space + 2 * n;
  uint32_t* next_order = space + 3 * n;
  for (int64_t i = 0; i < n; i++) {
    keys[i] = bits_of(sizes[i]);
    order[i] = uint32_t(i);
  }
  for (int shift = 0; shift < 31; shift += 11) {
    uint32_t starts[2048] = {};
    for (int64_t i = 0; i < n; i++) starts[(keys[i] >> shift) & 2047]++;
    uint32_t sum = 0;
    for (uint32_t& start : starts) sum += std::exchange(start, sum);
    for (int64_t i = 0; i < n; i++) {
      const uint32_t to = starts[(keys[i] >> shift) & 2047]++;
      next_keys[to] = keys[i];
      next_order[to] = order[i];
    }
    std::swap(keys, next_keys);
    std::swap(order, next_order);
  }
  for (int64_t i = 0; i < n; i++) ranks[order[i]] = uint32_t(i);
}
