// Runs csrc/cuda/*.cu on the CPU: g++ compiles the same source with this header instead of CUDA's.
//
// An OS thread runs whole blocks, one after another; the GPU threads of a block are fibers, so barriers and the
// instructions that a warp executes together are real. It is built to fail where a GPU only might: shared memory is
// 0xFF (NaN) when a block begins; the target of an asynchronous copy is 0xFF until its thread has waited for it; a
// barrier that some threads of a block or warp never reach aborts; each warp runs as far as the block's next barrier
// before the following one does, the first warp and lane first or, backwards, the last: a missing barrier shows in one
// of the orders. Not covered: other interleavings, speed, the rounding inside a tensor core. x86-64 only.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
#define BLOCK_SHARED(type, name) type& name = *reinterpret_cast<type*>(gpu_shim::block.shared)
#define threadIdx (gpu_shim::block.thread)
#define blockIdx (gpu_shim::block.index)

struct alignas(8) float2 {
  float x, y;
};

namespace gpu_shim {

struct Index {
  unsigned x;
};

constexpr size_t kStackBytes = 64 * 1024,
                 kSharedBytes = 48 * 1024;  // of a fiber; of a block, without asking for more
enum class State { kRunning, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  void* stack_pointer;
  State state;
  std::vector<Copy> copies;  // asked for, not waited for
  const void* given;         // to the other lanes of its warp
};

struct Block {
  Index thread, index;
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  void* scheduler = nullptr;
  const std::function<void()>* body = nullptr;
  alignas(16) unsigned char shared[kSharedBytes];
};
inline thread_local Block block;

extern "C" void gpu_shim_switch(void** save, void* to);
asm(R"(
  .text
  .weak gpu_shim_switch
  .type gpu_shim_switch, @function
gpu_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size gpu_shim_switch, . - gpu_shim_switch
)");

inline Fiber& current() { return block.fibers[block.thread.x]; }

inline void leave(State state) {
  Fiber& fiber = current();
  fiber.state = state;
  gpu_shim_switch(&fiber.stack_pointer, block.scheduler);
}

inline void enter() {
  (*block.body)();
  leave(State::kDone);
  __builtin_unreachable();
}

inline void start(unsigned t) {
  const auto end =
      reinterpret_cast<uintptr_t>(block.stacks.data() + (t + 1) * kStackBytes) & ~uintptr_t(15);
  auto** top = reinterpret_cast<void**>(end);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&enter);  // which then sees the stack as after a call
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  block.fibers[t] = {top, State::kRunning, {}, nullptr};
}

// Sets `threads` fibers from `first` on free if all of them wait at this barrier.
inline bool release(unsigned first, unsigned threads, State barrier) {
  const auto begin = block.fibers.begin() + first, end = begin + threads;
  if (!std::all_of(begin, end, [&](const Fiber& f) { return f.state == barrier; })) return false;
  std::for_each(begin, end, [](Fiber& f) { f.state = State::kRunning; });
  return true;
}

inline void run_block(bool backwards) {
  const unsigned threads = unsigned(block.fibers.size());
  std::memset(block.shared, 0xFF, kSharedBytes);
  for (unsigned t = 0; t < threads; t++) start(t);
  do {
    for (unsigned warp = 0; warp < threads; warp += 32) {
      do {
        for (unsigned n = warp; n < warp + 32; n++) {
          block.thread.x = backwards ? threads - 1 - n : n;
          if (current().state == State::kRunning)
            gpu_shim_switch(&block.scheduler, current().stack_pointer);
        }
      } while (release(backwards ? threads - 32 - warp : warp, 32, State::kAtWarpBarrier));
    }
  } while (release(0, threads, State::kAtBlockBarrier));
  for (const Fiber& fiber : block.fibers)
    if (fiber.state != State::kDone || !fiber.copies.empty()) {
      std::fprintf(stderr, "block %u: a barrier that not all threads reach, or an unawaited copy\n",
                   block.index.x);
      std::abort();
    }
}

// kernel() once per GPU thread of `blocks` blocks, on `workers` OS threads.
template <class Kernel>
void launch(unsigned blocks, unsigned threads, bool backwards, unsigned workers, Kernel kernel) {
  std::atomic<unsigned> next{0};
  const std::function<void()> body = kernel;
  const auto work = [&] {
    block.body = &body;
    block.fibers.resize(threads);
    block.stacks.resize(threads * kStackBytes);
    for (unsigned n; (n = next++) < blocks;) {
      block.index.x = backwards ? blocks - 1 - n : n;
      run_block(backwards);
    }
  };
  std::vector<std::thread> others;
  for (unsigned n = 1; n < std::min(workers, blocks); n++) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

// What lane `lane` of this warp gave; all lanes have given when the first of them reads.
inline const void* given_by(unsigned lane) {
  return block.fibers[block.thread.x / 32 * 32 + lane].given;
}

inline float widen(uint32_t bf16) {
  const uint32_t bits = bf16 << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace gpu_shim

inline void __syncthreads() { gpu_shim::leave(gpu_shim::State::kAtBlockBarrier); }
inline void __syncwarp() { gpu_shim::leave(gpu_shim::State::kAtWarpBarrier); }

// The instructions that the .cu file asks of the GPU in PTX, with the registers' layout as the PTX manual has it.

inline void copy_async(void* to, const void* from, int bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) {
    std::fprintf(stderr, "cp.async of 16 bytes to or from an address that is no multiple of 16\n");
    std::abort();
  }
  std::memset(to, 0xFF, 16);
  gpu_shim::current().copies.push_back({to, from, bytes});
}

inline void wait_for_copies() {
  for (const gpu_shim::Copy& copy : gpu_shim::current().copies) {
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, size_t(copy.bytes));
  }
  gpu_shim::current().copies.clear();
}

// ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16
inline void load_transposed(const uint16_t* row, uint32_t (&out)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) {
    std::fprintf(stderr, "ldmatrix of a row at an address that is no multiple of 16\n");
    std::abort();
  }
  const unsigned lane = threadIdx.x % 32;
  gpu_shim::current().given = row;
  __syncwarp();
  for (unsigned q = 0; q < 4; q++) {
    const auto* low = static_cast<const uint16_t*>(gpu_shim::given_by(8 * q + lane % 4 * 2));
    const auto* high = static_cast<const uint16_t*>(gpu_shim::given_by(8 * q + lane % 4 * 2 + 1));
    out[q] = uint32_t(low[lane / 4]) | uint32_t(high[lane / 4]) << 16;
  }
  __syncwarp();
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const Fragments mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  gpu_shim::current().given = &mine;
  __syncwarp();
  const unsigned lane = threadIdx.x % 32;
  const auto half = [](uint32_t pair, unsigned k) {
    return gpu_shim::widen(k % 2 ? pair >> 16 : pair & 0xFFFF);
  };
  for (unsigned e = 0; e < 4; e++) {
    const unsigned row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (unsigned k = 0; k < 16; k++) {
      const auto& left =
          *static_cast<const Fragments*>(gpu_shim::given_by(row % 8 * 4 + k % 8 / 2));
      const auto& right =
          *static_cast<const Fragments*>(gpu_shim::given_by(column * 4 + k % 8 / 2));
      c[e] += half(left.a[row / 8 + k / 8 * 2], k) * half(right.b[k / 8], k);
    }
  }
  __syncwarp();
}
