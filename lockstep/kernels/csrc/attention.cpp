#include "attention.h"

#include "attention_items.h"
#include "attention_softmax.h"
#include "bind.h"
#include "rope.h"

namespace lockstep {
namespace {

constexpr int64_t TILE = 32;  // queries of one item: their scores of a span stay in the first-level cache
constexpr int64_t AHEAD = 8;  // chunks: memory's latency times its speed
constexpr int MAX_THREADS = 1024;

// Memory of one thread, kept from call to call.
struct Scratch {
  std::vector<float> scores, span, running, parts;
  std::vector<uint32_t> queries, weights;
  std::vector<Work> work;
  template <class V>
  static auto* room(V& memory, int64_t n) {
    if (int64_t(memory.size()) < n) memory.resize(size_t(n));
    return memory.data();
  }
};
thread_local Scratch scratch;

// Spans that a thread works off for the one that began their item: `count` parts, in order.
struct Loan {
  float* parts;
  int64_t count;
} loans[MAX_THREADS];

template <class T>
struct Chunks {
  int64_t count = 0;
  const T *keys[SPAN_CHUNKS], *values[SPAN_CHUNKS];

  // What will be read AHEAD chunks after each of these keys, then values; `next` comes after them.
  void ahead(const Chunks& next, const T** found) const {
    const int64_t all = 2 * count;
    for (int64_t i = 0; i < all; i++) {
      const int64_t j = i + AHEAD, k = j - all;
      found[i] = j < count ? keys[j] : j < all ? values[j - count] : k < next.count ? next.keys[k] : values[0];
    }
  }
};

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

  // Where the chunks are that the item sees of a span.
  void find(const Step& step, const Item& item, int64_t span, Chunks<T>& found) const {
    const int32_t* table = step.tables + item.row * step.table_stride;
    const int64_t per_block = kv.block_size / CHUNK, from = item.from(span), to = item.to(span);
    int64_t block = from / per_block, inside = from % per_block;
    found.count = 0;
    for (int64_t chunk = from; chunk < to; chunk++) {
      const int64_t at = kv.chunk(table[block] * kv.block_size + inside * CHUNK, item.head);
      found.keys[found.count] = reinterpret_cast<const T*>(kv.keys) + at;
      found.values[found.count++] = reinterpret_cast<const T*>(kv.values) + at;
      if (++inside == per_block) inside = 0, block++;
    }
  }

  // Step 2 of attention.h for all queries of the item, into `part`. `next`: what will be read after this.
  void span(const Step& step, const Item& item, int64_t index, const Chunks<T>& chunks, const Chunks<T>& next, const Partial& part) const {
    const int64_t per_query = SPAN_CHUNKS * VALUES_PER_CHUNK<T>, head_dim = kv.head_dim, base = item.from(index) * CHUNK, end = chunks.count * CHUNK;
    const auto* queries = reinterpret_cast<const Value<T>*>(scratch.queries.data());
    float* scores = Scratch::room(scratch.scores, TILE * SPAN);
    auto* weights = reinterpret_cast<Value<T>*>(Scratch::room(scratch.weights, TILE * per_query));
    const T* ahead[2 * SPAN_CHUNKS];
    chunks.ahead(next, ahead);
    by_queries(item.count, [&](auto n, auto first, int64_t q) {
      score_rows<T, n(), first()>(chunks.keys, ahead, chunks.count, queries + q * head_dim, head_dim, head_dim, scores + q * SPAN);
    });
    Seen seen[TILE];
    for (int64_t q = 0; q < item.count; q++) {
      const int64_t p = position(step, item, q), high = std::clamp<int64_t>(p + 1 - base, 0, end);
      seen[q] = {std::clamp<int64_t>(items.first_seen(p) - base, 0, high), high};
      part.largest[q] = softmax.largest(scores + q * SPAN, seen[q]);
    }
    for (int64_t q = 0; q < item.count; q++)
      part.sum[q] = softmax.weigh<T>(scores + q * SPAN, chunks.count, seen[q], part.largest[q], weights + q * per_query);
    by_queries(item.count, [&](auto n, auto first, int64_t q) {
      value_rows<T, n(), first()>(chunks.values, ahead + chunks.count, chunks.count, weights + q * per_query, per_query, head_dim, part.out + q * width, width);
    });
    if (finite(part.out, item.count * width)) return;
    for (int64_t q = 0; q < item.count; q++)
      if (!finite(part.out + q * width, width)) only_seen(chunks, seen[q], weights + q * per_query, part.out + q * width);
  }

  // n: whole vectors (of 16).
  static bool finite(const float* out, int64_t n) {
    f32x16 none{}, more{};  // two chains
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) none += load(out + i) * 0.f, more += load(out + i + W) * 0.f;  // infinity times 0 is not a number
    if (i < n) none += load(out + i) * 0.f;
    return sum_lanes(none + more) == 0;
  }

  // The weighted values of one query once more, those that it does not see taken as 0: a weight of 0 times infinity is not 0.
  __attribute__((noinline)) void only_seen(const Chunks<T>& chunks, Seen seen, const Value<T>* weights, float* out) const {
    const int64_t head_dim = kv.head_dim, size = CHUNK * head_dim;
    std::vector<T> copy(size_t(chunks.count * size));
    const T* values[SPAN_CHUNKS];
    for (int64_t c = 0; c < chunks.count; c++) {
      T* to = copy.data() + c * size;
      values[c] = to;
      for (int64_t t = std::max<int64_t>(seen.low - c * CHUNK, 0); t < std::min(seen.high - c * CHUNK, CHUNK); t++)
        for (int64_t d = 0, at = t / PACK<T> * PACK<T> * head_dim + t % PACK<T>; d < head_dim; d++, at += PACK<T>) to[at] = chunks.values[c][at];
    }
    value_rows<T, 1, false>(values, values, chunks.count, weights, 0, head_dim, out, width);
  }

  void finish(const Step& step, const Item& item, const Partial& done) const {
    for (int64_t i = 0; i < item.count; i++) {
      T* out = dst + token(step, item, i) * ldd + query_head(item, i) * kv.head_dim;
      const f32x16 scale = splat(1.f / done.sum[i]);
      for (int64_t d = 0; d < kv.head_dim; d += W) store_n(out + d, load(done.out + i * width + d) * scale, kv.head_dim - d);
    }
  }

  // Works off scratch.work. Spans that began elsewhere are lent, one part each; all others are merged in order, and written
  // where no other thread has a span of the item.
  void work_off(const Step& step, int id) const {
    const auto& work = scratch.work;
    Chunks<T> now, next;
    if (!work.empty()) find(step, work[0].item, work[0].from, next);
    for (size_t i = 0; i < work.size(); i++) {
      const Item& item = work[i].item;
      const int64_t floats = Partial::floats(item.count, width);
      const bool lend = work[i].owner != id;
      float* parts = lend ? Scratch::room(scratch.parts, floats * (work[i].to - work[i].from)) : Scratch::room(scratch.span, Partial::floats(TILE, width));
      Partial running(Scratch::room(scratch.running, Partial::floats(TILE, width)), item.count);
      if (lend) loans[id] = {parts, work[i].to - work[i].from};
      else running.clear(item.count, width);
      take_queries(step, item);
      for (int64_t index = work[i].from; index < work[i].to; index++) {
        now = next;
        if (index + 1 < work[i].to) find(step, item, index + 1, next);
        else if (i + 1 < work.size()) find(step, work[i + 1].item, work[i + 1].from, next);
        Partial part(parts, item.count);
        span(step, item, index, now, next, part);
        if (lend) parts += floats;
        else softmax.merge(running, part, item.count, width);
      }
      if (!lend && work[i].last == id) finish(step, item, running);
    }
  }

  // Merges what later threads lent of the item that this one began last, and writes it.
  void collect(const Step& step, const Work& begun) const {
    Partial running(scratch.running.data(), begun.item.count);
    for (int by = begun.owner + 1; by <= begun.last; by++)
      for (int64_t i = 0; i < loans[by].count; i++)
        softmax.merge(running, Partial(loans[by].parts + i * Partial::floats(begun.item.count, width), begun.item.count), begun.item.count, width);
    finish(step, begun.item, running);
  }

  void run(const Step& step, Lane& lane) override {
    if (lane.size > MAX_THREADS) throw std::invalid_argument("attention runs on at most " + std::to_string(MAX_THREADS) + " threads");
    loans[lane.id].count = 0;
    const bool cut = items.share(step, lane.id, lane.size, scratch.work);
    work_off(step, lane.id);
    if (!cut) return;
    lane.barrier();
    if (scratch.work.empty()) return;
    if (const Work& last = scratch.work.back(); last.owner == lane.id && last.last > lane.id) collect(step, last);
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
