// The product of a block of rows with packed panels: what the kernels of all variants share.
//
// A kernel multiplies rows of activations with a block of a panel (some k of its 64 columns; how many each kernel chooses by the
// number of rows: `k_block`) and accumulates in float32 in memory between blocks, which rounds nothing. So every output has one chain of additions in the order of k, whatever the block and tile sizes are, and they may
// follow the caches and the number of rows.
#pragma once
#include <memory>

#include "packed.h"

namespace lockstep {

struct Rows {  // activations, row-major
  const void* data;
  DType type;
  int64_t ld;  // elements
  const char* at(int64_t row) const { return static_cast<const char*>(data) + row * ld * itemsize(type); }
};

struct Sink {  // what becomes of the sums
  virtual ~Sink() = default;
  // sums: [w.subtrees][rows][64], subtrees `stride` floats apart: the columns of panel p, rows from `row` on.
  virtual void take(int64_t p, int64_t row, int64_t rows, const float* sums, int64_t stride) const = 0;
};

// All threads of the team call it; contains no barrier.
void gemm(const Packed& w, const Rows& a, int64_t m, const Sink& sink, Lane& lane);

// The kernels behind it. The second is for bfloat16 activations with bfloat16 or int8 weights; has_pair_kernel says whether
// this library has one.
extern const bool has_pair_kernel;
void gemm_plain(const Packed& w, const Rows& a, int64_t m, const Sink& sink, Lane& lane);
void gemm_pairs(const Packed& w, const Rows& a, int64_t m, const Sink& sink, Lane& lane);

// Compares small products with plain code. 0: right; -1: the system refuses the processor's tiles; else how many are wrong.
int64_t linear_selfcheck();

// A thread's memory for rows, sums and unpacked weights. It grows and stays: a step allocates nothing after the first.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    size_t bytes = size_t(count) * sizeof(T) + 64;
    if (bytes > size_) {
      memory_.reset(new char[bytes]);
      size_ = bytes;
    }
    return reinterpret_cast<T*>((reinterpret_cast<size_t>(memory_.get()) + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<char[]> memory_;
  size_t size_ = 0;
};
struct Scratches { Scratch rows, sums, weights; };
Scratches& scratches();

// Walks over the next block of a thread's stream of panels, a little with every step of the kernel, so that memory never idles.
class Prefetch {
 public:
  Prefetch(const char* from, int64_t bytes) : next_(from), end_(from + bytes), bytes_(bytes) {}
  // Lines with every step, if `steps` of them fetch the block.
  int64_t share(int64_t steps) const { return (bytes_ / 64 + steps - 1) / steps; }
  LS_INLINE void lines(int64_t n) {
    for (; n > 0 && next_ < end_; n--, next_ += 64) __builtin_prefetch(next_, 0, 2);
  }
  // For a reader that is right behind: into the nearest cache.
  template <int64_t BYTES>
  LS_INLINE void step() {
#pragma GCC unroll 4
    for (int64_t i = 0; i < BYTES; i += 64) __builtin_prefetch(next_ + i, 0, 3);
    next_ += BYTES;
  }

 private:
  const char *next_, *end_;
  int64_t bytes_;
};

}  // namespace lockstep
