// CountSketch of dY^T X, hash version 3 (kernels/sketch/__init__.py): tensor cores, sm_80 and up.
//
// A block owns one bucket of one example, 64 x 64 floats in shared memory, and a split of the tiles
// that go there, one of every group of tiles. It multiplies tile after tile over the tokens of the
// example, loads the next stage of tokens meanwhile, and adds the signed sums at their permuted
// places. No other block writes there: no atomics, one order of sums. No header: NVRTC has none.
#if !defined(__CUDACC__)
#include "gpu_shim.h"  // tests/support/gpu/cuda_host runs this file on the CPU
#endif

using u16 = unsigned short;  // bits of a bf16
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

constexpr int kTile = 64;
constexpr int kThreads = 128;  // 2 x 2 warps, each with 32 x 32 of the tile
constexpr int kBucket = kTile * kTile;

// kernels/sketch/_cuda.py packs it: 8 bytes a field, in this order. Strides are in elements.
struct Job {
  const void* dy;      // [tokens, rows], dy_stride
  const void* x;       // [tokens, columns], x_stride
  const i64* offsets;  // [examples + 1]: first token of each
  const float* scale;  // null, or [rows, columns], scale_stride: multiplies the gradient
  float* out;          // [examples, buckets, 64, 64], added to
  float* partial;      // with more than one split: [examples, splits, buckets, 64, 64]
  i64 dy_stride, x_stride, scale_stride;
  i64 rows, columns, first_row, first_column;   // of the shard, which begins there
  i64 tiles_across, group_rows, group_columns;  // tiles across the parameter, and of a group
  i64 first_group_row, first_group_column, groups_across, groups;  // those that touch the shard
  u64 key;
  i64 examples, buckets, splits, dy_wide, x_wide;  // wide: every 16 bytes are aligned
};

#if defined(__CUDACC__)
#define BLOCK_SHARED(type, name) __shared__ type name
__device__ __forceinline__ u32 to_shared(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// Copies 16 bytes into shared memory asynchronously: `bytes` from global memory, zeros after them.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_shared(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Loads four 8 x 8 matrices of 16 bits. Lane l passes row l % 8 of matrix l / 8 and receives the
// elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4) of matrix q in out[q].
__device__ __forceinline__ void load_transposed(const u16* row, u32 (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(to_shared(row))
               : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8], bf16 into fp32. Of c, lane l holds rows l / 4 and l / 4 + 8,
// columns 2 (l % 4) and the next.
__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// For bf16 and float: elements of 16 bytes, tokens of a stage, the place of a chunk of 16 bytes.
template <class T>
struct Layout {
  static constexpr int kChunk = 16 / int(sizeof(T)), kChunks = kTile / kChunk,
                       kDepth = 64 / int(sizeof(T));
  // XOR by the token: the eight rows of a matrix that ldmatrix reads lie in different banks.
  static __device__ __forceinline__ int at(int token, int chunk) {
    return token * kTile + (sizeof(T) == 2 ? chunk ^ (token & 7) : chunk) * kChunk;
  }
};

template <class T>
struct alignas(16) Shared {
  T dy[2][Layout<T>::kDepth * kTile], x[2][Layout<T>::kDepth * kTile];  // 16 KiB
  float bucket[kBucket];                                                // 16 KiB
};

// Sums of a thread as a matrix instruction leaves them: of row block m (16) and column block n (8)
// of the warp's 32 x 32, rows lane / 4 and lane / 4 + 8, columns 2 (lane % 4) and the next.
using Sums = float[2][4][4];

// A stage of a block's work: kDepth tokens of a tile.
struct Step {
  i64 group;        // among those that touch the shard
  i64 token;        // among the tokens of all examples
  int row, column;  // of the shard, where the tile begins; negative if that is outside of it
};

// The SplitMix64 of csrc/common/splitmix64.inl.
__device__ __forceinline__ u64 splitmix64(u64 key, u64 counter) {
  u64 z = key + (counter + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

__device__ __forceinline__ float flip(float value, u32 minus) { return minus & 1 ? -value : value; }

// Advances to the first group, from step.group on, whose tile for this bucket touches the shard.
__device__ __forceinline__ void find_tile(const Job& job, u32 bucket, i64 last_group, Step& step) {
  const u32 p = u32(job.group_rows), q = u32(job.group_columns), wide = u32(job.groups_across);
  const u32 all = (u32(job.tiles_across) + q - 1) / q;
  for (; step.group < last_group; step.group++) {
    const u32 group_row = u32(job.first_group_row) + u32(step.group) / wide;
    const u32 group_column = u32(job.first_group_column) + u32(step.group) % wide;
    const u64 deal = splitmix64(job.key, 8 * u64(group_row * all + group_column) + 3);
    const u32 strip = group_row * p + (bucket / q + p - u32((deal >> 32) * p >> 32)) % p;
    const u32 left = group_column * q + (bucket % q + q - u32(u64(u32(deal)) * q >> 32)) % q;
    step.row = int(i64(strip) * kTile - job.first_row);
    step.column = int(i64(left) * kTile - job.first_column);
    const bool in_rows = step.row > -kTile && step.row < job.rows;
    if (in_rows && step.column > -kTile && step.column < job.columns) return;
  }
}

// Loads `tokens` rows of 64 columns from `first` on; entries outside of the matrix are zero.
template <class T>
__device__ __forceinline__ void load(const T* from, i64 stride, i64 columns, bool wide, int first,
                                     i64 tokens, T* to) {
  using L = Layout<T>;
#pragma unroll
  for (int c = int(threadIdx.x); c < L::kDepth * L::kChunks; c += kThreads) {
    const int token = c / L::kChunks, chunk = c % L::kChunks, column = first + chunk * L::kChunk;
    T* const target = to + L::at(token, chunk);
    const T* const source = from + token * stride + column;
    const i64 inside = token < tokens ? columns - column : 0;
    if (wide) {  // a chunk then never crosses the left edge
      const int n = column < 0 || inside <= 0 ? 0 : inside < L::kChunk ? int(inside) : L::kChunk;
      copy_async(target, n ? source : from, n * int(sizeof(T)));
    } else {
#pragma unroll
      for (int k = 0; k < L::kChunk; k++)
        target[k] = column + k >= 0 && k < inside ? source[k] : T(0);
    }
  }
}

template <class T>
__device__ __forceinline__ void load_step(const Job& job, const Step& step, i64 end,
                                          Shared<T>& shared, int side) {
  load(static_cast<const T*>(job.dy) + step.token * job.dy_stride, job.dy_stride, job.rows,
       job.dy_wide != 0, step.row, end - step.token, shared.dy[side]);
  load(static_cast<const T*>(job.x) + step.token * job.x_stride, job.x_stride, job.columns,
       job.x_wide != 0, step.column, end - step.token, shared.x[side]);
}

// sums += dy^T x over the tokens of a stage, of which `tokens` are not zero.
__device__ __forceinline__ void multiply(const u16* dy, const u16* x, i64 tokens, Sums& sums) {
  using L = Layout<u16>;
  const int lane = int(threadIdx.x) % 32;
  const int top = int(threadIdx.x) / 64 * 32, left = int(threadIdx.x) / 32 % 2 * 32;
  const int low = lane / 8 % 2, high = lane / 16;  // of which matrix this lane passes a row
#pragma unroll
  for (int k = 0; k < L::kDepth; k += 16) {
    if (k >= tokens) break;
    u32 a[2][4], b[2][4];
#pragma unroll
    for (int m = 0; m < 2; m++) {
      load_transposed(dy + L::at(k + lane % 8 + 8 * high, (top + 16 * m) / 8 + low), a[m]);
      load_transposed(x + L::at(k + lane % 8 + 8 * low, (left + 16 * m) / 8 + high), b[m]);
    }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int n = 0; n < 4; n++)
        multiply_add(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
  }
}

__device__ __forceinline__ void multiply(const float* dy, const float* x, i64 tokens, Sums& sums) {
  const int lane = int(threadIdx.x) % 32;
  const int top = int(threadIdx.x) / 64 * 32, left = int(threadIdx.x) / 32 % 2 * 32;
#pragma unroll 4
  for (int k = 0; k < Layout<float>::kDepth; k++) {
    if (k >= tokens) break;
    const float *y = dy + k * kTile + top + lane / 4, *v = x + k * kTile + left + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[m][n][e] += y[16 * m + e / 2 * 8] * v[8 * n + e % 2];
  }
}

// Returns the place of column pair `column` of row `row`. A warp reads eight rows and four pairs of
// columns, moved by any XOR; the 16 lanes of half a warp then reach 16 different pairs of banks.
__device__ __forceinline__ int place(int row, int column) {
  return row * kTile + (column ^ (row & 3) << 3);
}

// bucket[i ^ x, j ^ y] += signed, scaled sums[i, j]; sums = 0. No two threads share a place.
__device__ __forceinline__ void add_tile(const Job& job, const Step& step, Sums& sums, float* to) {
  const int lane = int(threadIdx.x) % 32;
  const int top = int(threadIdx.x) / 64 * 32, left = int(threadIdx.x) / 32 % 2 * 32;
  const u32 p = u32(job.group_rows), q = u32(job.group_columns), across = u32(job.tiles_across);
  const u32 strip = u32((job.first_row + step.row) / kTile);
  const u32 left_strip = u32((job.first_column + step.column) / kTile);
  const u64 counter = 8 * u64(strip * across + left_strip), masks = splitmix64(job.key, counter);
  const u64 high_rows = 8 * u64(strip * ((across + q - 1) / q) + left_strip / q) + 4;
  const u64 high_columns = 8 * u64(strip / p * across + left_strip) + 5;
  const int row_mask = int((splitmix64(job.key, high_rows) & 56) | (masks & 7));
  const int column_mask = int((splitmix64(job.key, high_columns) & 56) | (masks >> 8 & 7));
  const u32 row_signs = u32(splitmix64(job.key, counter + 1) >> top);
  const u32 column_signs = u32(splitmix64(job.key, counter + 2) >> left);
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int i = 16 * m + 8 * h + lane / 4, j = 8 * n + lane % 4 * 2;
        const u32 row_sign = row_signs >> i, signs = column_signs >> j;
        float first = flip(sums[m][n][2 * h], row_sign ^ signs);
        float second = flip(sums[m][n][2 * h + 1], row_sign ^ signs >> 1);
        if (job.scale) {
          const i64 row = step.row + top + i, column = step.column + left + j;
          const float* const at = job.scale + row * job.scale_stride + column;
          const bool inside = row >= 0 && row < job.rows;
          first *= inside && column >= 0 && column < job.columns ? at[0] : 0.f;
          second *= inside && column >= -1 && column + 1 < job.columns ? at[1] : 0.f;
        }
        const int column = (left + j) ^ column_mask;
        float* const pair = to + place((top + i) ^ row_mask, column & ~1);
        const float2 old = *reinterpret_cast<const float2*>(pair);
        *reinterpret_cast<float2*>(pair) = column & 1 ? float2{old.x + second, old.y + first}
                                                      : float2{old.x + first, old.y + second};
        sums[m][n][2 * h] = sums[m][n][2 * h + 1] = 0.f;
      }
}

template <class T>
__device__ __forceinline__ void sketch_bucket(const Job& job, Shared<T>& shared) {
  const u32 buckets = u32(job.buckets), splits = u32(job.splits);
  const u32 bucket = blockIdx.x % buckets, split = blockIdx.x / buckets % splits;
  const u32 example = blockIdx.x / buckets / splits;
  const i64 begin = job.offsets[example], end = job.offsets[example + 1];
  const i64 last_group = begin < end ? job.groups * (split + 1) / splits : 0;
  Step step = {job.groups * split / splits, begin, 0, 0};
  find_tile(job, bucket, last_group, step);
  if (splits == 1 && step.group >= last_group) return;

  for (int e = int(threadIdx.x); e < kBucket; e += kThreads) shared.bucket[e] = 0.f;
  if (step.group < last_group) load_step(job, step, end, shared, 0);
  Sums sums = {};
  for (int side = 0; step.group < last_group; side ^= 1) {
    Step next = step;
    next.token += Layout<T>::kDepth;
    const bool tile_ends = next.token >= end;
    if (tile_ends) {
      next.token = begin;
      next.group++;
      find_tile(job, bucket, last_group, next);
    }
    wait_for_copies();
    __syncthreads();  // this side is loaded, the other is free, the last tile is in the bucket
    if (next.group < last_group) load_step(job, next, end, shared, side ^ 1);
    multiply(shared.dy[side], shared.x[side], end - step.token, sums);
    if (tile_ends) add_tile(job, step, sums, shared.bucket);
    step = next;
  }
  __syncthreads();
  float* const target = splits == 1 ? job.out + (i64(example) * buckets + bucket) * kBucket
                                    : job.partial + i64(blockIdx.x) * kBucket;
#pragma unroll 8
  for (int e = int(threadIdx.x); e < kBucket; e += kThreads)
    target[e] = shared.bucket[place(e / kTile, e % kTile)] + (splits == 1 ? target[e] : 0.f);
}

// Grid: examples x splits x buckets, buckets first; 128 threads.
extern "C" __global__ void __launch_bounds__(kThreads)
    sketch_linear_bf16(const __grid_constant__ Job job) {
  BLOCK_SHARED(Shared<u16>, shared);
  sketch_bucket(job, shared);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    sketch_linear_f32(const __grid_constant__ Job job) {
  BLOCK_SHARED(Shared<float>, shared);
  sketch_bucket(job, shared);
}

// out += the sums of the splits, in order. Grid: examples x buckets x 32; a float a thread.
extern "C" __global__ void __launch_bounds__(kThreads) add_splits(const __grid_constant__ Job job) {
  const i64 e = i64(blockIdx.x) * kThreads + threadIdx.x, width = job.buckets * kBucket;
  const float* from = job.partial + e / width * job.splits * width + e % width;
  float total = 0.f;
  for (i64 split = 0; split < job.splits; split++) total += from[split * width];
  job.out[e] += total;
}
