// The order in which the partial sums of a row-parallel product are added (distributed/reduction_tree.py), and two ways to follow
// it: one rank adds all leaves of an element, or each rank adds what is there when it comes.
#pragma once
#include <stdexcept>
#include <vector>

#include "comm.h"
#include "simd.h"
#include "team.h"

namespace lockstep {

// A stack machine's program: i >= 0 pushes leaf i, -1 adds the two on top.
struct Tree {
  std::vector<int32_t> code;
  std::vector<int32_t> rank, place;   // of each leaf
  std::vector<int32_t> above, upper;  // the node that adds each leaf, and each node; -1: the root

  Tree(const int32_t* c, int64_t n_code, const int32_t* counts, int world) : code(c, c + n_code) {
    for (int r = 0; r < world; r++)
      for (int32_t i = 0; i < counts[r]; i++) rank.push_back(r), place.push_back(i);
    above.resize(rank.size(), -1);
    std::vector<int32_t*> stack;  // where the parent of what is on it goes
    size_t deepest = 0;
    upper.reserve(code.size());  // pointers into it stay
    for (int32_t x : code) {
      if (x >= int32_t(rank.size())) throw std::invalid_argument("the tree names a partial sum that nobody has");
      if (x >= 0) {
        stack.push_back(&above[size_t(x)]);
      } else {
        if (stack.size() < 2) throw std::invalid_argument("the tree's code adds what is not there");
        for (int half = 0; half < 2; half++) *stack.back() = int32_t(upper.size()), stack.pop_back();
        upper.push_back(-1);
        stack.push_back(&upper.back());
      }
      deepest = std::max(deepest, stack.size());
    }
    if (stack.size() != 1 || deepest > DEPTH) throw std::invalid_argument("the tree's code is not one sum");
  }
  static constexpr size_t DEPTH = 8;

  // 16 elements of the sum; leaf(i) gives the address of leaf i's.
  template <class Leaf>
  LS_INLINE f32x16 at(const Leaf& leaf, int64_t count) const {
    if (code.size() == 1) return load_n(leaf(0), count);
    f32x16 stack[DEPTH];
    int top = 0;
    for (int32_t x : code) {
      if (x >= 0) {
        stack[top++] = load_n(leaf(x), count);
      } else {
        stack[top - 2] = stack[top - 2] + stack[top - 1];
        top--;
      }
    }
    return stack[0];
  }

  // Whether ranks of the group are to climb: where they share cores, and a meeting costs more than waiting for the last one's sums.
  bool climbs(const Group& group) const { return group.crowded && group.halves && rank.size() > 1 && upper.size() <= MAX_NODES; }

  // Every rank, with its leaves [rows, n] ready. Whoever comes second to a node adds the halves, into its own leaf, and goes on to the
  // node above: either order of two numbers has the same sum. Who comes to the root calls last(a, b, i), for the halves' row i.
  // leaf(i): where leaf i is. Waits for nobody.
  template <class Leaf, class Last>
  void climb(const Group& group, const Leaf& leaf, int64_t rows, int64_t n, Lane& lane, const Last& last) {
    for (size_t mine = 0; mine < rank.size(); mine++) {
      if (rank[mine] != group.rank) continue;
      float* a = leaf(mine);
      for (int32_t node = above[mine];; node = upper[size_t(node)]) {
        lane.barrier();
        if (lane.id == 0) other_ = meet_half(group.halves[node], int32_t(mine));
        lane.barrier();
        if (other_ < 0) break;
        const float* b = leaf(size_t(other_));
        for (int64_t i = lane.first(rows); i < lane.last(rows); i++)
          upper[size_t(node)] < 0 ? last(a + i * n, b + i * n, i) : add(a + i * n, b + i * n, n);
        if (upper[size_t(node)] < 0) break;
      }
    }
  }

 private:
  int32_t other_ = -1;  // the half that came first, for the threads of this rank
  // -1 for the first half to come; the second finds the first.
  static int32_t meet_half(std::atomic<int32_t>& half, int32_t mine) {
    const int32_t other = half.exchange(mine + 1) - 1;
    if (other >= 0) half.store(0, std::memory_order_relaxed);  // for the next product, after a meeting
    return other;
  }
  static LS_INLINE void add(float* a, const float* b, int64_t n) {
    for (int64_t j = 0; j < n; j += W) {
      const int64_t count = std::min<int64_t>(W, n - j);
      store_n(a + j, load_n(a + j, count) + load_n(b + j, count), count);
    }
  }
};

}  // namespace lockstep
