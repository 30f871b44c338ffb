// The form in which weights lie in memory.
//
//   panel      64 output columns, their whole input dim next to each other; the last one is filled up with zero columns
//   16-bit     [k / 2][64 columns][2]: a 32-bit lane has two neighbours of k, as the dot product instructions want it, and
//   and int8   as `lane << 16` and `lane & 0xffff0000` turn into float32 where there are none
//   others     [k][64 columns]
//   atoms      each atom's k is filled up with zeros to a whole granule
#pragma once
#include <memory>
#include <vector>

#include "hugepages.h"
#include "linear.h"

namespace lockstep {

constexpr int64_t PANEL = 64;
constexpr int64_t K_BLOCK = 256;  // of k: a panel's block is 32 KiB of bf16 and stays in the first-level cache

// One run of k that is summed without a stop.
struct KStep {
  int64_t at, len;   // in the packed k
  bool first, last;  // of its atom
  int merges;        // after it: how often the top of the stack is added to the sum
  int depth;         // partial sums on the stack before those merges
  int emit;          // >= 0: the sum is partial sum number `emit`; else it goes on the stack
};

struct Packed {
  int64_t n = 0, k = 0, k_packed = 0, panels = 0, granule = 1, pairs = 1;
  DType type = DType::BF16;
  bool gated = false;
  bool direct = true;  // activations can be read in place: no atom needed filling up
  std::vector<int64_t> bounds, starts;  // of the atoms: in the source's k, in the packed k
  std::vector<KStep> steps;             // blocks of at most K_BLOCK
  int subtrees = 0, depth = 0;
  std::unique_ptr<HugeBuffer> memory;
  std::vector<float> scale;

  int64_t panel_bytes() const { return k_packed * PANEL * itemsize(type); }
  const char* panel(int64_t p) const { return memory->data() + p * panel_bytes(); }
  // Where source row r (an output) lies: gated weights alternate 32 gate and 32 up columns.
  int64_t column(int64_t r) const {
    if (!gated) return r;
    const int64_t half = n / 2, j = r < half ? r : r - half;
    return j / 32 * PANEL + j % 32 + (r < half ? 0 : 32);
  }
  // Offset in elements inside a panel.
  int64_t offset(int64_t kk, int64_t col) const { return pairs == 2 ? (kk / 2 * PANEL + col) * 2 + kk % 2 : kk * PANEL + col; }
};

}  // namespace lockstep
