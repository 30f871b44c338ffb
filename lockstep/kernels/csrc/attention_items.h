// The work of one attention operation as items, and who does what.
//
// An item is a tile of queries that share a KV head; it is worked off span by span. Spans of all items, by their cost, are
// cut into one run per thread. Each thread finds its run from the step alone, so nothing is shared to agree on it.
#pragma once
#include <algorithm>
#include <vector>

#include "attention_dot.h"
#include "program.h"

namespace lockstep {

// A tile of the queries of `row` for KV head `head`: pairs [first, first + count) of the row's (token, query head of the
// group) pairs, token by token. Sees chunks [chunk0, chunk1) of the row's context.
struct Item {
  int64_t row, head, first, count, chunk0, chunk1;
  int64_t span0() const { return chunk0 / SPAN_CHUNKS; }
  int64_t span1() const { return (chunk1 + SPAN_CHUNKS - 1) / SPAN_CHUNKS; }
  // Its chunks of one span.
  int64_t from(int64_t span) const { return std::max(chunk0, span * SPAN_CHUNKS); }
  int64_t to(int64_t span) const { return std::min(chunk1, (span + 1) * SPAN_CHUNKS); }
  int64_t chunk_cost() const { return count + 4; }  // reading a chunk costs about as much as 4 queries
  int64_t cost() const { return (chunk1 - chunk0) * chunk_cost(); }
  int64_t cost_before(int64_t span) const { return (from(span) - chunk0) * chunk_cost(); }
};

// What one thread does of an item: spans [from, to). The thread `owner` that has the first span merges and writes; those
// up to `last` lend it theirs.
struct Work {
  Item item;
  int64_t from, to;
  int owner, last;
};

struct Items {
  int64_t window, tile;                     // tile: pairs of one item
  std::vector<std::vector<int32_t>> group;  // query heads by KV head

  int64_t first_seen(int64_t position) const { return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0; }

  template <class F>
  void each(const Step& step, F&& f) const {
    for (int64_t row = 0; row < step.rows; row++) {
      const int64_t tokens = step.query_start[row + 1] - step.query_start[row], before = step.seq_lens[row] - tokens;
      for (int64_t head = 0; head < int64_t(group.size()); head++) {
        const int64_t width = int64_t(group[size_t(head)].size()), pairs = tokens * width;
        for (int64_t first = 0; first < pairs; first += tile) {
          const int64_t count = std::min(tile, pairs - first);
          const int64_t low = first_seen(before + first / width), high = before + (first + count - 1) / width;
          f(Item{row, head, first, count, low / CHUNK, high / CHUNK + 1});
        }
      }
    }
  }

  // The work of thread `id` of `threads`, in order, and whether any item of the step is cut between threads.
  bool share(const Step& step, int id, int threads, std::vector<Work>& mine) const {
    mine.clear();
    int64_t total = 0, start = 0;
    bool cut = false;
    each(step, [&](const Item& item) { total += item.cost(); });
    each(step, [&](const Item& item) {
      const int64_t span0 = item.span0(), span1 = item.span1();
      auto doer = [&](int64_t span) { return int((start + item.cost_before(span)) * threads / total); };
      const int owner = doer(span0), last = doer(span1 - 1);
      cut |= owner != last;
      if (owner <= id && id <= last) {
        int64_t from = span0, to = span1;
        while (from < span1 && doer(from) < id) from++;
        while (to > from && doer(to - 1) > id) to--;
        if (from < to) mine.push_back({item, from, to, owner, last});
      }
      start += item.cost();
    });
    return cut;
  }
};

}  // namespace lockstep
