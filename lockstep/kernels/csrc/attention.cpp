#include "attention.h"

#include "attention_items.h"
#include "attention_softmax.h"
#include "bind.h"
#include "rope.h"

namespace lockstep {
namespace {

constexpr int64_t TILE = 32;  // queries of one item: their scores of a span stay in the first-level cache
constexpr int MAX_THREADS = 1024;

// Memory of one thread, kept from call to call.
struct Scratch {
  std::vector<float> scores, span, running, parts;
  std::vector<uint32_t> queries, weights;
  template <class V>
  static auto* room(V& memory, int64_t n) {
    if (int64_t(memory.size()) < n) memory.resize(size_t(n));
    return memory.data();
  }
};
thread_local Scratch scratch;
float* lent[MAX_THREADS];  // parts of items that a thread works off for the one that began them

template <class T>
struct Attention : Op {
  const T* qkv;
  T* dst;
  int64_t ldq, ldd, width;  // width: head_dim in whole vectors
  Items items;
  Softmax softmax;
  KvCache kv;

  Attention(const T* qkv, int64_t ldq, T* dst, int64_t ldd, Items items, Softmax softmax, KvCache kv)
      : qkv(qkv), dst(dst), ldq(ldq), ldd(ldd), width((kv.head_dim + W - 1) / W * W), items(std::move(items)), softmax(softmax), kv(kv) {}

  int64_t part_floats(const Item& item) const { return Partial::floats(item.count, width); }

  // The pair's token in the step and its query head.
  int64_t token(const Step& step, const Item& item, int64_t i) const {
    return step.query_start[item.row] + (item.first + i) / int64_t(items.group[size_t(item.head)].size());
  }
  int64_t query_head(const Item& item, int64_t i) const {
    const auto& group = items.group[size_t(item.head)];
    return group[size_t(item.first + i) % group.size()];
  }
  int64_t position(const Step& step, const Item& item, int64_t i) const {
    return step.seq_lens[item.row] - step.query_start[item.row + 1] + token(step, item, i);
  }

  // The item's queries, as they are multiplied, into scratch.queries with row stride head_dim.
  void take_queries(const Step& step, const Item& item) const {
    auto* out = reinterpret_cast<Value<T>*>(Scratch::room(scratch.queries, TILE * kv.head_dim));
    for (int64_t i = 0; i < item.count; i++)
      put_query(qkv + token(step, item, i) * ldq + query_head(item, i) * kv.head_dim, kv.head_dim, out + i * kv.head_dim);
  }

  // The chunks of one span that the item sees: addresses of keys and values. Returns how many.
  int64_t find_chunks(const Step& step, const Item& item, int64_t from, int64_t to, const T** keys, const T** values) const {
    const int32_t* table = step.tables + item.row * step.table_stride;
    const int64_t per_block = kv.block_size / CHUNK;
    int64_t block = from / per_block, inside = from % per_block, n = 0;
    for (int64_t chunk = from; chunk < to; chunk++) {
      const int64_t at = kv.chunk(table[block] * kv.block_size + inside * CHUNK, item.head);
      keys[n] = reinterpret_cast<const T*>(kv.keys) + at;
      values[n++] = reinterpret_cast<const T*>(kv.values) + at;
      if (++inside == per_block) inside = 0, block++;
    }
    return n;
  }

  // Step 2 of attention.h for all queries of the item, into `part`.
  void span(const Step& step, const Item& item, int64_t index, const Partial& part) const {
    const T *keys[SPAN_CHUNKS], *values[SPAN_CHUNKS];
    const int64_t from = std::max(item.chunk0, index * SPAN_CHUNKS), to = std::min(item.chunk1, (index + 1) * SPAN_CHUNKS);
    const int64_t chunks = find_chunks(step, item, from, to, keys, values), per_query = SPAN_CHUNKS * VALUES_PER_CHUNK<T>;
    const auto* queries = reinterpret_cast<const Value<T>*>(scratch.queries.data());
    float* scores = Scratch::room(scratch.scores, TILE * SPAN);
    auto* weights = reinterpret_cast<Value<T>*>(Scratch::room(scratch.weights, TILE * per_query));
    by_queries(item.count, [&](auto n, int64_t q) {
      score_rows<T, n()>(keys, chunks, queries + q * kv.head_dim, kv.head_dim, kv.head_dim, scores + q * SPAN);
    });
    for (int64_t q = 0; q < item.count; q++) {
      const int64_t p = position(step, item, q), end = chunks * CHUNK;
      const int64_t high = std::clamp<int64_t>(p + 1 - from * CHUNK, 0, end), low = std::clamp<int64_t>(items.first_seen(p) - from * CHUNK, 0, high);
      softmax.span<T>(scores + q * SPAN, chunks, low, high, weights + q * per_query, part.largest + q, part.sum + q);
    }
    by_queries(item.count, [&](auto n, int64_t q) {
      value_rows<T, n()>(values, chunks, weights + q * per_query, per_query, kv.head_dim, part.out + q * width, width);
    });
  }

  // Spans [from, to) of the item merged in order into scratch.running, which is begun first.
  Partial run_spans(const Step& step, const Item& item, int64_t from, int64_t to) const {
    Partial running(Scratch::room(scratch.running, Partial::floats(TILE, width)), item.count);
    Partial part(Scratch::room(scratch.span, Partial::floats(TILE, width)), item.count);
    std::fill(running.largest, running.sum, -INFINITY);
    std::fill(running.sum, running.out + item.count * width, 0.f);
    take_queries(step, item);
    for (int64_t index = from; index < to; index++) {
      span(step, item, index, part);
      softmax.merge(running, part, item.count, width);
    }
    return running;
  }

  void finish(const Step& step, const Item& item, const Partial& done) const {
    for (int64_t i = 0; i < item.count; i++) {
      T* out = dst + token(step, item, i) * ldd + query_head(item, i) * kv.head_dim;
      const f32x16 scale = splat(1.f / done.sum[i]);
      for (int64_t d = 0; d < kv.head_dim; d += W) store_n(out + d, load(done.out + i * width + d) * scale, kv.head_dim - d);
    }
  }

  // Spans [from, to) of an item that another thread began, one part each, for that one to merge.
  void lend_spans(const Step& step, const Item& item, int64_t from, int64_t to, int id) const {
    float* at = Scratch::room(scratch.parts, (to - from) * part_floats(item));
    lent[id] = at;
    take_queries(step, item);
    for (int64_t index = from; index < to; index++, at += part_floats(item)) span(step, item, index, Partial(at, item.count));
  }

  // Merges what threads after `id` lent of the item, whose first span is at `start`, and writes the result.
  void collect(const Step& step, const Item& item, int64_t start, const Share& share, int id) const {
    Partial running(scratch.running.data(), item.count);
    int64_t owner = id, taken = 0;
    for (int64_t index = item.span0(); index < item.span1(); index++) {
      const int64_t by = share.owner(start, item, index);
      if (by == id) continue;
      taken = by == owner ? taken + 1 : 0;
      owner = by;
      softmax.merge(running, Partial(lent[by] + taken * part_floats(item), item.count), item.count, width);
    }
    finish(step, item, running);
  }

  void run(const Step& step, Lane& lane) override {
    if (lane.size == 1) return items.each(step, [&](const Item& item) { finish(step, item, run_spans(step, item, item.span0(), item.span1())); });
    if (lane.size > MAX_THREADS) throw std::invalid_argument("attention runs on at most " + std::to_string(MAX_THREADS) + " threads");
    Share share{0, lane.size};
    items.each(step, [&](const Item& item) { share.total += item.cost(); });
    int64_t start = 0, open_start = -1;
    bool cut = false;
    Item open{};
    items.each(step, [&](const Item& item) {
      const int64_t span0 = item.span0(), span1 = item.span1(), first = share.owner(start, item, span0), last = share.owner(start, item, span1 - 1);
      cut |= first != last;
      if (first <= lane.id && lane.id <= last) {
        int64_t from = span0, to = span1;
        while (from < span1 && share.owner(start, item, from) < lane.id) from++;
        while (to > from && share.owner(start, item, to - 1) > lane.id) to--;
        if (first < lane.id) lend_spans(step, item, from, to, lane.id);
        else if (auto running = run_spans(step, item, from, to); last == lane.id) finish(step, item, running);
        else open = item, open_start = start;
      }
      start += item.cost();
    });
    if (!cut) return;
    lane.barrier();
    if (open_start >= 0) collect(step, open, open_start, share, lane.id);
  }
};

}  // namespace

Op* op_attention(const void* qkv, int64_t ldq, void* dst, int64_t ldd, int64_t num_q, int64_t num_kv, int64_t head_dim, const int32_t* kv_of_q,
                 double scale, int64_t window, double softcap, void* kv, int64_t num_blocks, int64_t block_size, int64_t dtype) {
  KvCache cache(kv, num_blocks, block_size, num_kv, head_dim, DType(dtype));
  if (!(scale > 0) || softcap < 0 || window < 0) throw std::invalid_argument("attention needs scale > 0, softcap >= 0 and window >= 0");
  Items items{window, TILE, std::vector<std::vector<int32_t>>(size_t(num_kv))};
  for (int32_t q = 0; q < num_q; q++) {
    if (kv_of_q[q] < 0 || kv_of_q[q] >= num_kv) throw std::invalid_argument("kv_of_q[" + std::to_string(q) + "]=" + std::to_string(kv_of_q[q]) + " is not one of the KV heads");
    items.group[size_t(kv_of_q[q])].push_back(q);
  }
  return dispatch(cache.dtype, [&](auto tag) -> Op* {
    using T = decltype(tag);
    return new Attention<T>(static_cast<const T*>(qkv), ldq, static_cast<T*>(dst), ldd, std::move(items), Softmax(float(scale), float(softcap)), cache);
  });
}

extern const std::vector<PyMethodDef> attention_methods;
const std::vector<PyMethodDef> attention_methods = {BIND(op_angles), BIND(op_rope_store), BIND(op_attention), BIND(kv_read), BIND(kv_write)};

}  // namespace lockstep
