// Sums over ranks in one fixed tree: floats of 32 bits and less in float32, rounded once; whole numbers wrap.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "simd.h"

namespace lockstep {

// A stack machine's program: i >= 0 pushes leaf i, -1 adds the two on top (the lower one first). See reduction_tree.py.
struct Tree {
  std::vector<int32_t> code;
  int leaves = 0;
  // Checks that the program uses each leaf once and leaves one value. Throws std::invalid_argument.
  Tree(const int64_t* code, int64_t n);
  static const Tree& over_ranks(int world);  // cut at the largest power of two below the number of leaves
};
constexpr int TREE_DEPTH = 16, TREE_BLOCK = 256;

struct boolean { uint8_t v; };  // torch adds bools by "or"

template <class T>
struct Sum {
  using Acc = T;
  static void load(const T* p, Acc* a, int64_t n) { memcpy(a, p, size_t(n) * sizeof(T)); }
  static void store(T* p, const Acc* a, int64_t n) { memcpy(p, a, size_t(n) * sizeof(T)); }
  static Acc add(Acc a, Acc b) { return Acc(a + b); }
};
template <class T>
struct HalfSum {
  using Acc = float;
  // Rounded up to whole vectors: the stack's blocks have room for it.
  static void load(const T* p, float* a, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store_raw(a + i, lockstep::load(p + i));
    if (i < n) store_raw(a + i, load_n(p + i, n - i));
  }
  static void store(T* p, const float* a, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) lockstep::store(p + i, load_raw<f32x16>(a + i));
    if (i < n) store_n(p + i, load_raw<f32x16>(a + i), n - i);
  }
  static float add(float a, float b) { return a + b; }
};
template <> struct Sum<bf16> : HalfSum<bf16> {};
template <> struct Sum<f16> : HalfSum<f16> {};
template <>
struct Sum<boolean> {
  using Acc = uint8_t;
  static void load(const boolean* p, Acc* a, int64_t n) { memcpy(a, p, size_t(n)); }
  static void store(boolean* p, const Acc* a, int64_t n) { memcpy(p, a, size_t(n)); }
  static Acc add(Acc a, Acc b) { return a | b; }
};

// The tree of two leaves, which is most of all sums.
template <class T>
void add_two(const T* a, const T* b, T* out, int64_t n) {
  int64_t i = 0;
  if constexpr (std::is_same_v<typename Sum<T>::Acc, float>) {
    for (; i + W <= n; i += W) store(out + i, load(a + i) + load(b + i));
    if (i < n) store_n(out + i, load_n(a + i, n - i) + load_n(b + i, n - i), n - i);
  } else {
    for (; i < n; i++) {
      typename Sum<T>::Acc x, y;
      Sum<T>::load(a + i, &x, 1), Sum<T>::load(b + i, &y, 1);
      x = Sum<T>::add(x, y);
      Sum<T>::store(out + i, &x, 1);
    }
  }
}

// out[0..n) = the tree over leaves[i][0..n). out may be one of the leaves.
template <class T>
void evaluate(const Tree& tree, const T* const* leaves, T* out, int64_t n) {
  using S = Sum<T>;
  if (tree.code.size() == 3) return add_two(leaves[0], leaves[1], out, n);
  alignas(64) typename S::Acc stack[TREE_DEPTH][TREE_BLOCK];
  for (int64_t at = 0; at < n; at += TREE_BLOCK) {
    int64_t m = std::min<int64_t>(TREE_BLOCK, n - at);
    int top = 0;
    for (int32_t c : tree.code) {
      if (c >= 0) {
        S::load(leaves[c] + at, stack[top++], m);
      } else {
        auto *a = stack[top - 2], *b = stack[top - 1];
        for (int64_t i = 0; i < m; i++) a[i] = S::add(a[i], b[i]);
        top--;
      }
    }
    S::store(out + at, stack[0], m);
  }
}

// Calls f with a value of the C++ type of a dtype number of shm.py; whole numbers are unsigned here, since they wrap.
template <class F>
auto with_type(int64_t dtype, F&& f) {
  switch (dtype) {
    case 0: return f(float{});
    case 1: return f(bf16{});
    case 2: return f(f16{});
    case 3: case 4: return f(uint8_t{});
    case 5: return f(boolean{});
    case 6: return f(uint16_t{});
    case 7: return f(uint32_t{});
    case 8: return f(uint64_t{});
    case 9: return f(double{});
    default: throw std::invalid_argument("no sums of dtype number " + std::to_string(dtype));
  }
}

}  // namespace lockstep
