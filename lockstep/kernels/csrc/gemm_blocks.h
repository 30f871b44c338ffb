// The loops around a kernel: rows in blocks, panels, atoms, blocks of k, and the tree over the atoms.
//
// A kernel is a class with
//   using Row                                the type of its activations
//   int64_t row_block(const Packed&)         rows whose activations fit the L2 cache
//   int64_t k_block(const Packed&, m)        k of a block of the panel that fits the L1 cache, for m rows
//   const Row* rows(...)                     activations as the kernel wants them, k padded as the weight is
//   void block(w, weights, k, a, lda, m, c, fresh, prefetch)
//                                            c [m][64] (= or +=) rows times the block; k a multiple of the granule
#pragma once
#include <algorithm>

#include "gemm.h"

namespace lockstep {

template <class Kernel>
class PanelLoop {
 public:
  PanelLoop(const Packed& w, const Rows& a, const Sink& sink) : w_(w), a_(a), sink_(sink) {}

  // This thread's share: a run of (block of rows, panel) in that order, and what others would be late with.
  void run(int64_t m, Lane& lane) {
    if (m < 1) return;
    int64_t blocks = (m + kernel_.row_block(w_) - 1) / kernel_.row_block(w_), prepared = -1;
    lane.begin(blocks * w_.panels);
    for (int64_t i; (i = lane.take()) >= 0;) {
      int64_t b = i / w_.panels, first = m * b / blocks, last = m * (b + 1) / blocks;
      if (b != prepared) {
        rows_ = kernel_.rows(w_, a_, first, last - first, &lda_);
        sums_ = scratches().sums.template get<float>(w_.depth * (last - first) * PANEL);
        prepared = b;
      }
      panel(i % w_.panels, first, last - first);
    }
  }

 private:
  void panel(int64_t p, int64_t row, int64_t m) {
    float* top = sums_;
    for (const Atom& atom : w_.atoms) {
      this->atom(w_.panel(p), atom, m, top);
      top += m * PANEL;
      for (int64_t i = 0; i < atom.merges; i++, top -= m * PANEL) add(top - 2 * m * PANEL, top - m * PANEL, m * PANEL);
    }
    sink_.take(p, row, m, sums_, m * PANEL);
  }

  void atom(const char* panel, const Atom& atom, int64_t m, float* c) {
    int64_t step = kernel_.k_block(w_, m);
    for (int64_t k = 0; k < atom.padded; k += step) {
      const char* weights = panel + w_.offset(atom.at + k);
      int64_t size = std::min(step, atom.padded - k);
      kernel_.block(w_, weights, size, rows_ + atom.at + k, lda_, m, c, k == 0);
    }
  }

  static void add(float* left, const float* right, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(left + i, load(left + i) + load(right + i));
  }

  const Packed& w_;
  const Rows& a_;
  const Sink& sink_;
  Kernel kernel_;
  const typename Kernel::Row* rows_ = nullptr;
  int64_t lda_ = 0;
  float* sums_ = nullptr;
};

// Cuts m rows into tiles of at most `most` rows, as even as can be: f(first row, rows, tile, tiles).
template <class F>
LS_INLINE void each_tile(int64_t m, int64_t most, F&& f) {
  int64_t tiles = (m + most - 1) / most;
  for (int64_t t = 0; t < tiles; t++) f(m * t / tiles, m * (t + 1) / tiles - m * t / tiles, t, tiles);
}

}  // namespace lockstep
