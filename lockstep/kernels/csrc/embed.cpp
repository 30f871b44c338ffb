// The vocabulary-parallel embedding: every rank ends up with all rows, whoever holds them.
#include <algorithm>
#include <memory>

#include "bind.h"
#include "comm.h"
#include "linear.h"
#include "program.h"

namespace lockstep {
namespace {

// Rows of the vocabulary-parallel embedding. bounds [world + 1]: rank r holds ids [bounds[r], bounds[r + 1]).
struct Embed : Op {
  const void* table;      // [rows of this rank, width], or null and ...
  const Packed* packed;   // ... the head's packed weight, which a tied model shares
  std::vector<int64_t> bounds;
  int64_t width;
  void* out;
  DType type;
  float scale;
  Group* group;  // null: ids of other ranks give zeros
  int rank;
  uint64_t tag;

  template <class T>
  void fetch(int64_t id, T* to) const {
    const int64_t row = id - bounds[size_t(rank)];
    if (packed) packed_row(*packed, row, type, to);
    else memcpy(to, static_cast<const T*>(table) + row * width, size_t(width) * sizeof(T));
  }
  // Times scale, rounded. Adding zero makes -0 the 0 that a sum over ranks gives.
  template <class T>
  void place(const T* from, T* to) const {
    for (int64_t j = 0; j < width; j += W) {
      const int64_t count = std::min<int64_t>(W, width - j);
      f32x16 v = load_n(from + j, count) + 0.f;
      if (scale != 1.f) v = v * splat(scale);
      store_n(to + j, v, count);
    }
  }
  int owner(int64_t id) const {
    if (id < bounds.front() || id >= bounds.back()) throw std::invalid_argument("token id " + std::to_string(id) + " is not in the vocabulary");
    return int(std::upper_bound(bounds.begin(), bounds.end(), id) - bounds.begin()) - 1;
  }

  template <class T>
  void alone(const Step& step, Lane& lane) {
    std::vector<T> row(static_cast<size_t>(width));
    for (int64_t i = lane.first(step.tokens); i < lane.last(step.tokens); i++) {
      if (owner(step.ids[i]) == rank) fetch<T>(step.ids[i], row.data());
      else std::fill(row.begin(), row.end(), T{});
      place<T>(row.data(), static_cast<T*>(out) + i * width);
    }
  }
  template <class T>
  void shared(const Step& step, Lane& lane) {
    const int64_t fit = int64_t(group->slot_bytes) / (width * int64_t(sizeof(T)));
    for (int64_t at = 0; at < step.tokens; at += fit) {
      const int64_t rows = std::min(fit, step.tokens - at);
      T* mine = reinterpret_cast<T*>(group->slot(rank));
      for (int64_t i = lane.first(rows); i < lane.last(rows); i++)
        if (owner(step.ids[at + i]) == rank) fetch<T>(step.ids[at + i], mine + i * width);
      lane.barrier();
      if (lane.id == 0) group->sync(tag << 32 | uint64_t(rows));
      lane.barrier();
      for (int64_t i = lane.first(rows); i < lane.last(rows); i++)
        place<T>(reinterpret_cast<const T*>(group->slot_after(owner(step.ids[at + i]))) + i * width, static_cast<T*>(out) + (at + i) * width);
    }
  }
  void run(const Step& step, Lane& lane) override {
    dispatch(type, [&](auto t) {
      using T = decltype(t);
      if (group && group->world > 1) shared<T>(step, lane);
      else alone<T>(step, lane);
    });
  }
};

Op* op_embed(const void* table, Packed* packed, const int64_t* bounds, int64_t world, int64_t rank, int64_t width, void* out, int64_t dtype, double scale, Group* group, int64_t tag) {
  auto op = std::make_unique<Embed>();
  op->table = table, op->packed = packed, op->bounds.assign(bounds, bounds + world + 1), op->width = width, op->out = out;
  op->type = DType(dtype), op->scale = float(scale), op->group = group, op->rank = int(rank), op->tag = uint64_t(tag);
  return op.release();
}

}  // namespace

extern const std::vector<PyMethodDef> embed_methods;
const std::vector<PyMethodDef> embed_methods = {BIND(op_embed)};

}  // namespace lockstep
