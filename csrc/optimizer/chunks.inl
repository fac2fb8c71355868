// One chunk of moments and weights as floats in L1.

template <class T>
static inline T* at(void* data, int64_t first) {
  return static_cast<T*>(data) + first;
}

static void widen_all(const uint16_t* x, float* out, int n) {
  for (int i = 0; i < n; i++) out[i] = widen(x[i]);
}

// Joins a bf16 weight with the 16 bits below it. They are signed, since the weight is rounded to
// nearest, with halves away from zero.
static inline float joined(uint16_t weight, int16_t low) {
  return as_float((uint32_t(weight) << 16) + uint32_t(int32_t(low)));
}

static void store_bf16(const float* x, uint16_t* out, int n) {
  for (int i = 0; i < n; i++) out[i] = bits_to_bf16(as_bits(x[i]));
}

static void store_split(const float* x, uint16_t* out, int16_t* low, int n) {
  for (int i = 0; i < n; i++) {
    const uint32_t bits = as_bits(x[i]);
    const uint32_t sane = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits;
    out[i] = uint16_t((sane + 0x8000u) >> 16);
    low[i] = int16_t(sane & 0xffffu);
  }
}

// A chunk of the moments as floats, in place or in a buffer.
struct MomentChunk {
  float *m, *v;
  alignas(64) float first[kUpdateChunk], second[kUpdateChunk];

  void load(const AdamWJob& job, const AdamWTensor& t, int64_t from, int n) {
    m = first;
    v = second;
    if (job.moments == Moments::F32) {
      m = at<float>(t.exp_avg, from);
      v = at<float>(t.exp_avg_sq, from);
    } else if (job.moments == Moments::BF16) {
      widen_all(at<uint16_t>(t.exp_avg, from), first, n);
      widen_all(at<uint16_t>(t.exp_avg_sq, from), second, n);
    } else {
      for (int i = 0; i < n; i += kMomentBlock) {
        const int64_t block = (from + i) / kMomentBlock;
        const int size = n - i < kMomentBlock ? n - i : kMomentBlock;
        decode<false>(at<int8_t>(t.exp_avg, from + i), t.exp_avg_scale[block], first + i, size);
        decode<true>(at<uint8_t>(t.exp_avg_sq, from + i), t.exp_avg_sq_scale[block], second + i,
                     size);
      }
    }
  }

  void store(const AdamWJob& job, const AdamWTensor& t, int64_t from, int n,
             RandomBits random) const {
    if (job.moments == Moments::F32) return;
    uint32_t bits[kUpdateChunk];
    if (job.stochastic) fill_random(random, uint64_t(t.first + from), bits, n);
    if (job.moments == Moments::BF16 && job.stochastic) {
      store_bf16_stochastic(first, at<uint16_t>(t.exp_avg, from), n, bits, 16);
      store_bf16_stochastic(second, at<uint16_t>(t.exp_avg_sq, from), n, bits, 0);
    } else if (job.moments == Moments::BF16) {
      store_bf16(first, at<uint16_t>(t.exp_avg, from), n);
      store_bf16(second, at<uint16_t>(t.exp_avg_sq, from), n);
    } else {
      for (int i = 0; i < n; i += kMomentBlock) {
        const int64_t block = (from + i) / kMomentBlock;
        const int size = n - i < kMomentBlock ? n - i : kMomentBlock;
        const uint32_t* of_block = job.stochastic ? bits + i : nullptr;
        encode<false>(first + i, at<int8_t>(t.exp_avg, from + i), t.exp_avg_scale + block, size,
                      of_block);
        encode<true>(second + i, at<uint8_t>(t.exp_avg_sq, from + i), t.exp_avg_sq_scale + block,
                     size, of_block);
      }
    }
  }
};

// A chunk of the weights, or of their master, as floats.
struct WeightChunk {
  float* w;
  alignas(64) float values[kUpdateChunk];

  void load(const AdamWJob& job, const AdamWTensor& t, int64_t from, int n) {
    w = values;
    if (!job.weight_bf16) {
      w = at<float>(t.weight, from);
    } else if (job.master == Master::F32) {
      w = at<float>(t.master, from);
    } else if (job.master == Master::SPLIT) {
      const uint16_t* high = at<uint16_t>(t.weight, from);
      const int16_t* low = at<int16_t>(t.master, from);
      for (int i = 0; i < n; i++) values[i] = joined(high[i], low[i]);
    } else {
      widen_all(at<uint16_t>(t.weight, from), values, n);
    }
  }

  // Leaves the new weight, or its master, in w.
  void store(const AdamWJob& job, const AdamWTensor& t, int64_t from, int n, RandomBits random) {
    if (!job.weight_bf16) return;
    uint16_t* weight = at<uint16_t>(t.weight, from);
    if (job.master == Master::SPLIT) return store_split(w, weight, at<int16_t>(t.master, from), n);
    if (job.master == Master::F32 || !job.stochastic) {
      store_bf16(w, weight, n);
    } else {
      uint32_t bits[kUpdateChunk];
      fill_random(random, uint64_t(t.first + from), bits, n);
      store_bf16_stochastic(w, weight, n, bits, 16);
    }
    if (job.master == Master::NONE && t.average) widen_all(weight, values, n);
  }
};
