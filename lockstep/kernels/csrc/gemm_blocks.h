// The loops around a kernel: rows in blocks, panels, atoms, blocks of k, and the tree over the atoms.
//
// A kernel is a class with
//   using Row                                the type of its activations
//   int64_t row_block(const Packed&)         rows whose activations fit the L2 cache
//   int64_t k_block(const Packed&, m)        k of a block of the panel, for m rows
//   const Row* rows(...)                     activations as the kernel wants them, k padded as the weight is
//   void block(w, weights, k, a, lda, m, c, fresh)
//                                            c [m][64] (= or +=) rows times the block; k a multiple of the granule
// One with FUSES does what follows the block too, tile by tile while its sums are in registers:
//   void block(..., fresh, end)              see End
// and is told the rows that it will be given next, to fetch them while it works on those of now:
//   void next_rows(w, a, first, count, now)
#pragma once
#include <algorithm>

#include "gemm.h"

namespace lockstep {

// What follows the last block of an atom: `merges` additions to the sums before it in the tree, the nearest first, each
// `stride` floats before the other; and after the last atom, `take` for the finished sums.
struct End {
  int64_t merges = 0, stride = 0;
  const Sink* sink = nullptr;  // null: more atoms follow
  int64_t panel = 0, row = 0;  // what they are
  const float* sums = nullptr;  // where all of them are
  bool alone = false;  // they are all there is: they need not be put there
  void take(int64_t first, int64_t rows, const float* at) const {
    if (sink) sink->take(panel, row + first, rows, at, stride);
  }
  void take(int64_t first, int64_t rows) const { take(first, rows, sums + first * PANEL); }
};

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
        if constexpr (Kernel::FUSES) kernel_.next_rows(w_, a_, last, b + 1 < blocks ? m * (b + 2) / blocks - last : 0, last - first);
        sums_ = scratches().sums.template get<float>(w_.depth * (last - first) * PANEL);
        prepared = b;
      }
      panel(i % w_.panels, first, last - first);
    }
  }

 private:
  using Row = typename Kernel::Row;

  void panel(int64_t p, int64_t row, int64_t m) {
    float* top = sums_;
    for (const Atom& atom : w_.atoms) {
      End end{atom.merges, m * PANEL};
      if (&atom == &w_.atoms.back()) end.sink = &sink_, end.panel = p, end.row = row, end.sums = sums_, end.alone = w_.subtrees == 1;
      this->atom(w_.panel(p), atom, m, top, end);
      top += (1 - atom.merges) * m * PANEL;
    }
  }

  void atom(const char* panel, const Atom& atom, int64_t m, float* c, const End& end) {
    int64_t step = kernel_.k_block(w_, m);
    for (int64_t k = 0; k < atom.padded; k += step) {
      const char* weights = panel + w_.offset(atom.at + k);
      int64_t size = std::min(step, atom.padded - k);
      const Row* a = rows_ + atom.at + k;
      if constexpr (Kernel::FUSES) kernel_.block(w_, weights, size, a, lda_, m, c, k == 0, k + size < atom.padded ? End{} : end);
      else kernel_.block(w_, weights, size, a, lda_, m, c, k == 0);
    }
    if constexpr (Kernel::FUSES) return;
    for (int64_t i = 0; i < end.merges; i++, c -= end.stride) add(c - end.stride, c, end.stride);
    end.take(0, m);
  }

  static void add(float* left, const float* right, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(left + i, load(left + i) + load(right + i));
  }

  const Packed& w_;
  const Rows& a_;
  const Sink& sink_;
  Kernel kernel_;
  const Row* rows_ = nullptr;
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
