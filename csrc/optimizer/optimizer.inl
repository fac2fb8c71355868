// AdamW in one pass over each parameter, a chunk in L1 at a time. Included inside a level's namespace.

// In float, whatever it is stored as. Square roots vectorize because of -fno-math-errno.
static void update_chunk(const AdamWJob& job, const AdamWTensor& t, int n, float* __restrict w,
                         const float* __restrict g, float* __restrict m, float* __restrict v) {
  const bool near = job.rest1 < 0.5f;  // lerp from the nearer end, as torch does: exact at both
  const float step = near ? job.rest1 : -job.beta1;
  const float clip = job.clip, beta2 = job.beta2, rest2 = job.rest2, decay = job.decay;
  const float root = t.root, epsilon = job.epsilon, rate = t.rate;
  for (int i = 0; i < n; i++) {
    const float gradient = g[i] * clip;
    const float from = near ? m[i] : gradient;
    const float first = from + step * (gradient - m[i]);
    const float second = v[i] * beta2 + rest2 * gradient * gradient;
    const float denominator = std::sqrt(second) * root + epsilon;
    m[i] = first;
    v[i] = second;
    w[i] = w[i] * decay - rate * (first / denominator);
  }
}

static void take_roots(float* __restrict x, int n) {
  for (int i = 0; i < n; i++) x[i] = std::sqrt(x[i]);
}

// 32 random bits of element i: two rounds of Wellons' lowbias32 with a key before each.
struct RandomBits {
  uint32_t before, between;

  uint32_t operator()(uint32_t i) const {
    uint32_t x = i ^ before;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= between;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
  }
};

// A float plus 16 random bits below bf16's last, cut: up with the probability of the part cut off. Never to infinity.
static inline uint16_t stochastic_bf16(float value, uint32_t random16) {
  const uint32_t bits = as_bits(value), size = bits & 0x7fffffffu;
  const uint32_t sum = bits + random16;
  const bool past =
      (sum & 0x7fffffffu) >= 0x7f800000u;  // and for infinity itself, which is no sum's result
  const uint32_t cut = (past ? bits : sum) >> 16;
  return uint16_t(size > 0x7f800000u ? 0x7fc0u : cut);
}

// The master of a bf16 weight: 16 bits below it, signed, as its rounding is to nearest with halves away from zero.
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

static void fill_random(RandomBits random, uint32_t first, uint32_t* bits, int n) {
  for (int i = 0; i < n; i++) bits[i] = random(first + uint32_t(i));
}

static void store_bf16_stochastic(const float* x, uint16_t* out, int n, const uint32_t* bits,
                                  int shift) {
  for (int i = 0; i < n; i++) out[i] = stochastic_bf16(x[i], (bits[i] >> shift) & 0xffffu);
}

// Scale of up to 256 moments: their largest size, NaN if one is NaN.
static inline float largest_size(const float* x, int n) {
  int32_t top = 0;
  for (int i = 0; i < n; i++) {
    const int32_t size = int32_t(as_bits(x[i]) & 0x7fffffffu);
    top = size > top ? size : top;
  }
  return as_float(uint32_t(top));
}

// First moments as sign * (code / 127)^2 * scale, second ones as (code / 255)^4 * scale. Stochastic rounding is unbiased
// in the value, without random bits it is to nearest; a second moment above zero keeps a code above zero, so that no step is divided by epsilon alone.
template <bool Second, class Code>
static void encode(const float* x, Code* codes, float* scale, int n, const uint32_t* random) {
  const float steps = Second ? 255.f : 127.f,
              most = Second ? steps * steps * steps * steps : steps * steps;
  const float top = largest_size(x, n);
  *scale = top;
  if (!(top >= 1.17549435e-38f &&
        top <= 3.40282347e38f)) {  // all of no size, or one that is not finite
    for (int i = 0; i < n; i++) codes[i] = Code(top > 1.f || top != top ? steps : 0.f);
    if (top < 1.f) *scale = 0.f;
    return;
  }
  const float inverse = 1.f / top;
  float place[kMomentBlock], root[kMomentBlock];
  for (int i = 0; i < n; i++) {
    const float size = as_float(as_bits(x[i]) & 0x7fffffffu);
    place[i] = root[i] = size * inverse * most;
  }
  take_roots(root, n);
  if constexpr (Second) take_roots(root, n);
  for (int i = 0; i < n; i++) {
    const uint32_t bits = ((random ? random[i] : 0x80008000u) >> (Second ? 0 : 16)) & 0xffffu;
    const float share = float(int32_t(bits)) * (1.f / 65536.f);
    const int32_t whole = int32_t(root[i] < steps - 1.f ? root[i] : steps - 1.f);
    const float low = float(whole), high = low + 1.f;
    const float below = Second ? (low * low) * (low * low) : low * low;
    const float above = Second ? (high * high) * (high * high) : high * high;
    int32_t code = whole + int32_t(share * (above - below) < place[i] - below);
    if constexpr (Second)
      code += int32_t(code == 0) & int32_t(place[i] > 0.f);
    else
      code = x[i] < 0.f ? -code : code;
    codes[i] = Code(code);
  }
}

template <bool Second, class Code>
static void decode(const Code* codes, float scale, float* x, int n) {
  for (int i = 0; i < n; i++) {
    const float code = float(int32_t(codes[i]));
    if constexpr (Second)
      x[i] = (code * code) * (code * code) * float(1.0 / (255.0 * 255.0 * 255.0 * 255.0)) * scale;
    else
      x[i] = code * std::fabs(code) * float(1.0 / (127.0 * 127.0)) * scale;
  }
}

template <class T>
static inline T* at(void* data, int64_t first) {
  return static_cast<T*>(data) + first;
}

static void widen_all(const uint16_t* x, float* out, int n) {
  for (int i = 0; i < n; i++) out[i] = widen(x[i]);
}

// A chunk of the moments as floats: where they lie, or in a buffer.
struct MomentChunk {
  float *m, *v;
  alignas(64) float first[kUpdateChunk], second[kUpdateChunk];

  void load(const AdamWJob& job, const AdamWTensor& t, int64_t from, int n) {
    m = first, v = second;
    if (job.moments == Moments::F32) {
      m = at<float>(t.exp_avg, from), v = at<float>(t.exp_avg_sq, from);
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
    if (job.stochastic) fill_random(random, uint32_t(from), bits, n);
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

// The same of the weights, or of their master.
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

  // Leaves in w what the weight, or its master, now is.
  void store(const AdamWJob& job, const AdamWTensor& t, int64_t from, int n, RandomBits random) {
    if (!job.weight_bf16) return;
    uint16_t* weight = at<uint16_t>(t.weight, from);
    if (job.master == Master::SPLIT) return store_split(w, weight, at<int16_t>(t.master, from), n);
    if (job.master == Master::F32 || !job.stochastic) {
      store_bf16(w, weight, n);
    } else {
      uint32_t bits[kUpdateChunk];
      fill_random(random, uint32_t(from), bits, n);
      store_bf16_stochastic(w, weight, n, bits, 16);
    }
    if (job.master == Master::NONE && t.average) widen_all(weight, values, n);
  }
};

static void average_chunk(float* __restrict average, const float* __restrict w, float share,
                          int n) {
  for (int i = 0; i < n; i++) average[i] += (w[i] - average[i]) * share;
}

static void update_item(const AdamWJob& job, const AdamWTensor& t, int64_t first, int64_t stop) {
  // Elements beyond 2^32 have keys of their own; an item never crosses that border.
  const uint32_t far = uint32_t(uint64_t(first) >> 32) * 0x9e3779b9u;
  const uint32_t low = uint32_t(t.key), high = uint32_t(t.key >> 32) ^ far;
  WeightChunk weights;
  MomentChunk moments;
  alignas(64) float widened[kUpdateChunk];
  for (int64_t from = first; from < stop; from += kUpdateChunk) {
    const int n = stop - from < kUpdateChunk ? int(stop - from) : kUpdateChunk;
    const float* g = widened;
    if (job.grad_bf16)
      widen_all(at<uint16_t>(t.grad, from), widened, n);
    else
      g = at<float>(t.grad, from);
    weights.load(job, t, from, n);
    moments.load(job, t, from, n);
    update_chunk(job, t, n, weights.w, g, moments.m, moments.v);
    weights.store(job, t, from, n, {low, high});
    moments.store(job, t, from, n, {high, low});
    if (t.average) average_chunk(t.average + from, weights.w, t.average_weight, n);
    if (job.zero_grad) {
      const size_t item = job.grad_bf16 ? 2 : 4;
      std::memset(static_cast<char*>(t.grad) + size_t(from) * item, 0, size_t(n) * item);
    }
  }
}

// body(tensor, first, stop, item) for every kUpdateItem elements of every tensor, small ones in the same region.
template <class Size, class Body>
static void for_each_update_item(int64_t count, int threads, const Size& size, const Body& body) {
  int64_t items = 0;
  for (int64_t k = 0; k < count; k++) items += update_items(size(k));
#pragma omp parallel num_threads(threads)
  {
    int64_t tensor = 0, before = 0;  // a thread's items ascend, so its search goes on where it was
#pragma omp for schedule(static)
    for (int64_t item = 0; item < items; item++) {
      while (item >= before + update_items(size(tensor))) before += update_items(size(tensor++));
      const int64_t first = (item - before) * kUpdateItem, n = size(tensor);
      body(tensor, first, first + kUpdateItem < n ? first + kUpdateItem : n, item);
    }
  }
}

static void adamw(const AdamWJob& job) {
  for_each_update_item(
      job.count, job.threads, [&](int64_t k) { return job.tensors[k].n; },
      [&](int64_t k, int64_t first, int64_t stop, int64_t) {
        update_item(job, job.tensors[k], first, stop);
      });
}

template <class T>
static double square_sum(const T* x, int64_t n) {
  double lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; j++) {
      const double value = double(value_of(x[i + j]));
      lanes[j] += value * value;
    }
  for (; i < n; i++) lanes[0] += double(value_of(x[i])) * double(value_of(x[i]));
  for (int width = 8; width; width /= 2)
    for (int j = 0; j < width; j++) lanes[j] += lanes[j + width];
  return lanes[0];
}

static void square_sums(const SquareSums& job) {
  for_each_update_item(
      job.count, job.threads, [&](int64_t k) { return job.sizes[k]; },
      [&](int64_t k, int64_t first, int64_t stop, int64_t item) {
        job.sums[item] =
            job.bf16 ? square_sum(static_cast<const uint16_t*>(job.data[k]) + first, stop - first)
                     : square_sum(static_cast<const float*>(job.data[k]) + first, stop - first);
      });
}

const OptimizerKernels optimizer_kernels = {adamw, square_sums};
