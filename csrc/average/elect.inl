// TIES of bf16 models in one loop, after sums.inl: the steps of mix_deltas in deltas.inl, with the
// same bits, for rules that keep the largest deltas and elect a sign.

static const int kMostElected = 8;  // branches

// The cut of each branch, in the bits of sizes.
struct Cuts {
  int32_t below[kMostElected];  // keeps sizes above it
  int32_t value[kMostElected];  // counts sizes that equal it
  int64_t equal[kMostElected];
};

// Writes the merged values of n elements. Returns the number of inputs that are not finite.
template <int K, bool normalize>
static int32_t elect_block(const MixRule& rule, const void* const* inputs, int64_t at, int64_t n,
                           Cuts* cuts, double* __restrict out) {
  const uint16_t* x[K];
  double w[K];
  int32_t below[K], value[K], equal[K];
  for (int k = 0; k < K; k++) {
    x[k] = static_cast<const uint16_t*>(inputs[k]) + at;
    w[k] = rule.weight[k];
    below[k] = cuts->below[k];
    value[k] = cuts->value[k];
    equal[k] = 0;
  }
  const uint16_t* __restrict start = static_cast<const uint16_t*>(inputs[K]) + at;
  const double scale = rule.scale;
  int32_t bad = 0;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    const float base = widen(start[i]);
    double d[K], total = 0.0;
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      const float other = widen(x[k][i]);
      const int32_t size = int32_t(as_bits(other - base) & 0x7fffffffu);
      const double delta = double(other) - double(base);
      bad += !(delta - delta == 0.0);
      equal[k] += size == value[k];
      const double weighted = delta * w[k];
      d[k] = size > below[k] ? weighted : 0.0;
      total += d[k];
    }
    double mixed = 0.0;
    double divisor = 0.0;
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      const double toward = total >= 0.0 ? d[k] : -d[k];
      mixed += toward > 0.0 ? d[k] : 0.0;
      if (normalize) divisor += toward > 0.0 ? w[k] : 0.0;
    }
    if (normalize) mixed /= divisor != 0.0 ? divisor : 1.0;
    out[i] = double(base) + scale * mixed;
  }
  for (int k = 0; k < K; k++) cuts->equal[k] = equal[k];
  return bad;
}

typedef int32_t (*ElectBlock)(const MixRule&, const void* const*, int64_t, int64_t, Cuts*, double*);

template <bool normalize>
static ElectBlock elect_block_of(int branches) {
  switch (branches) {
    case 1: return elect_block<1, normalize>;
    case 2: return elect_block<2, normalize>;
    case 3: return elect_block<3, normalize>;
    case 4: return elect_block<4, normalize>;
    case 5: return elect_block<5, normalize>;
    case 6: return elect_block<6, normalize>;
    case 7: return elect_block<7, normalize>;
    case 8: return elect_block<8, normalize>;
    default: return nullptr;
  }
}

// The function for a rule; null if it has steps that elect_block lacks.
static ElectBlock elect_block_for(const MixRule& rule, const DType* types) {
  const int count = rule.branches;
  if (!rule.elect || rule.low == nullptr || rule.by_variance || rule.stream != nullptr ||
      rule.plain_votes || rule.enlarge != nullptr || count > kMostElected)
    return nullptr;
  for (int k = 0; k < count; k++)
    if (types[k] != DType::BF16 || as_bits(rule.high[k]) != kNoSize) return nullptr;
  if (types[count] != DType::BF16) return nullptr;
  return rule.normalize ? elect_block_of<true>(count) : elect_block_of<false>(count);
}

// Merges a block and counts its ties down. Returns false, and changes nothing but `out`, where only
// some of a block's ties are to be kept.
static bool elect(ElectBlock block, const MixRule& rule, const void* const* inputs, int64_t at,
                  int64_t n, int64_t* low_ties, double* out, int64_t* nonfinite) {
  Cuts cuts;
  for (int k = 0; k < rule.branches; k++) {
    cuts.value[k] = int32_t(as_bits(rule.low[k]));
    cuts.below[k] = cuts.value[k] - (low_ties[k] > 0);
  }
  const int32_t bad = block(rule, inputs, at, n, &cuts, out);
  for (int k = 0; k < rule.branches; k++)
    if (low_ties[k] > 0 && cuts.equal[k] > low_ties[k]) return false;
  for (int k = 0; k < rule.branches; k++) low_ties[k] -= low_ties[k] > 0 ? cuts.equal[k] : 0;
  *nonfinite += bad;
  return true;
}
