// The layout of a packed weight.
//
// Panels of 64 output columns, one after the other; a panel is one stream of memory in the order of k. Within it, 16-bit and
// int8 weights lie in pairs of k, [k / 2][64][2]: an instruction that multiplies pairs (AVX512-BF16, AMX) takes them as they
// are, and plain vector code gets the even k of 32-bit lanes by a shift and the odd by a mask. float32 and float16 lie as
// [k][64]. Columns beyond n, and k beyond an atom's end up to the kernel's granule, are zeros.
#pragma once
#include <memory>
#include <vector>

#include "linear.h"

namespace lockstep {

constexpr int64_t PANEL = 64;
constexpr int64_t HALF = PANEL / 2;  // a gated panel: 32 gate columns, then their 32 up columns

struct Atom {
  int64_t from, size;      // columns of the source
  int64_t at, padded;      // the same in the packed panel
  int64_t merges = 0;      // how many nodes of the tree end with this atom: additions that follow it
};

struct Packed {
  int64_t n = 0, k = 0;   // rows and columns of the source
  DType type = DType::F32;  // of what is stored
  bool gated = false, pairs = false;
  bool gaps = false;  // some atom is padded, so rows of activations must be too
  int64_t kp = 0;     // k with the padding
  int64_t panels = 0, panel_bytes = 0;
  int64_t subtrees = 0, depth = 0;  // partial sums at the end; most at any time
  std::vector<Atom> atoms;
  char* data = nullptr;
  std::vector<float> scale;  // [panels * 64] int8 only, in the order of the packed columns

  Packed() = default;
  Packed(const Packed&) = delete;
  ~Packed();
  // The source's row that column c of panel p holds, -1 for padding.
  int64_t source(int64_t p, int64_t c) const {
    int64_t row = gated ? p * HALF + c % HALF : p * PANEL + c, rows = gated ? n / 2 : n;
    return row < rows ? row + (gated && c >= HALF ? rows : 0) : -1;
  }
  const char* panel(int64_t p) const { return data + p * panel_bytes; }
  int64_t offset(int64_t k_packed) const { return k_packed * PANEL * itemsize(type); }  // bytes from a panel's begin
};

// A bfloat16 weight [n, k] whose rows lie next to each other.
std::unique_ptr<Packed> pack_bf16(const void* src, int64_t n, int64_t k, const int64_t* bounds, int64_t atoms);

// Padding of an atom in this library's kernels.
#if defined(__AMX_BF16__) || defined(LOCKSTEP_EMULATE_AMX)
constexpr int64_t PAIR_GRANULE = 32;
#else
constexpr int64_t PAIR_GRANULE = 2;
#endif

}  // namespace lockstep
