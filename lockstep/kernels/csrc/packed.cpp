// Packing weights. See packed.h for the layout.
#include "packed.h"

#include <algorithm>
#include <cmath>

#include "bind.h"

namespace lockstep {

int64_t packed_n(const Packed& w) { return w.n; }
int64_t packed_subtrees(const Packed& w) { return w.subtrees; }
bool packed_scaled(const Packed& w) { return !w.scale.empty(); }
const float* packed_scale(const Packed& w) { return w.scale.data(); }

namespace {

// Where the tree's node [lo, hi) is cut (distributed/reduction_tree.py).
int64_t cut(int64_t lo, int64_t hi) {
  int64_t p = 1;
  while (p * 2 < hi - lo) p *= 2;
  return lo + p;
}

// Fills in merges and emissions of the atoms of the node [lo, hi) of the tree, for the run [first, stop).
struct Schedule {
  int64_t first, stop;
  std::vector<int> merges, emit;
  int found = 0;

  void whole(int64_t lo, int64_t hi) {
    if (hi - lo == 1) return;
    whole(lo, cut(lo, hi)), whole(cut(lo, hi), hi);
    merges[size_t(hi - 1 - first)]++;
  }
  void node(int64_t lo, int64_t hi) {
    if (stop <= lo || hi <= first) return;
    if (first <= lo && hi <= stop) {
      whole(lo, hi);
      emit[size_t(hi - 1 - first)] = found++;
      return;
    }
    node(lo, cut(lo, hi)), node(cut(lo, hi), hi);
  }
};

void plan(Packed& w, int64_t first, int64_t total) {
  const int64_t atoms = int64_t(w.bounds.size()) - 1;
  Schedule s{first, first + atoms, std::vector<int>(size_t(atoms)), std::vector<int>(size_t(atoms), -1)};
  s.node(0, total);
  w.subtrees = s.found;
  int depth = 0;
  for (int64_t i = 0; i < atoms; i++) {
    const int64_t len = w.bounds[size_t(i + 1)] - w.bounds[size_t(i)];
    const int64_t padded = (len + w.granule - 1) / w.granule * w.granule;
    w.starts.push_back(w.k_packed);
    for (int64_t at = 0; at < padded; at += K_BLOCK) {
      const bool last = at + K_BLOCK >= padded;
      KStep step{w.k_packed + at, std::min(K_BLOCK, padded - at), at == 0, last, 0, depth, -1};
      if (last) {
        step.merges = s.merges[size_t(i)], step.emit = s.emit[size_t(i)];
        depth += step.emit >= 0 ? -step.merges : 1 - step.merges;
        w.depth = std::max(w.depth, depth);
      }
      w.steps.push_back(step);
    }
    w.direct = w.direct && (padded == len || atoms == 1) && w.bounds[size_t(i)] == w.k_packed;
    w.k_packed += padded;
  }
  w.direct = w.direct && w.k_packed == w.k;
}

// Source element [r, k] times 1 / scale as the packed type.
struct Source {
  const char* data;
  DType type;
  int64_t ld;
  float at(int64_t r, int64_t k) const {
    const int64_t i = r * ld + k;
    switch (type) {
      case DType::F32: return reinterpret_cast<const float*>(data)[i];
      case DType::BF16: return to_float(reinterpret_cast<const bf16*>(data)[i]);
      default: return to_float(reinterpret_cast<const f16*>(data)[i]);
    }
  }
};

// A row of 16-bit weights of the same type, a pair of k at a time.
void put_pairs(const Packed& w, const Source& source, int64_t r, char* panel, int64_t col) {
  const uint16_t* row = reinterpret_cast<const uint16_t*>(source.data) + r * source.ld;
  uint32_t* to = reinterpret_cast<uint32_t*>(panel) + col;
  for (size_t a = 0; a + 1 < w.bounds.size(); a++) {
    int64_t k = w.bounds[a], at = w.starts[a] / 2 * PANEL;
    for (; k + 2 <= w.bounds[a + 1]; k += 2, at += PANEL) memcpy(to + at, row + k, 4);
    if (k < w.bounds[a + 1]) to[at] = row[k];
  }
}

void put(Packed& w, const Source& source, int64_t r, char* panel, int64_t col) {
  const int64_t size = itemsize(w.type);
  const bool same = source.type == w.type;
  const float inverse = w.scale.empty() ? 1.f : w.scale[size_t(r)] > 0.f ? 1.f / w.scale[size_t(r)] : 0.f;
  for (size_t a = 0; a + 1 < w.bounds.size(); a++)
    for (int64_t k = w.bounds[a]; k < w.bounds[a + 1]; k++) {
      const int64_t to = w.offset(w.starts[a] + k - w.bounds[a], col);
      if (same) {
        memcpy(panel + to * size, source.data + (r * source.ld + k) * size, size_t(size));
        continue;
      }
      const float v = source.at(r, k);
      if (w.type == DType::I8) {
        const float q = std::nearbyint(v * inverse);
        reinterpret_cast<int8_t*>(panel)[to] = int8_t(std::max(-127.f, std::min(127.f, q)));
      } else if (w.type == DType::F32) {
        reinterpret_cast<float*>(panel)[to] = v;
      } else if (w.type == DType::BF16) {
        store_n(reinterpret_cast<bf16*>(panel) + to, splat(v), 1);
      } else {
        store_n(reinterpret_cast<f16*>(panel) + to, splat(v), 1);
      }
    }
}

Packed* packed_new(const void* src, int64_t src_dtype, int64_t n, int64_t k, int64_t ld, int64_t weight_dtype, int64_t act_dtype,
                   const int64_t* bounds, int64_t n_bounds, int64_t first, int64_t total, bool gated, const float* scale) {
  auto w = std::make_unique<Packed>();
  w->n = n, w->k = k, w->type = DType(weight_dtype), w->gated = gated;
  if (gated && n % 2) throw std::invalid_argument("a gated weight has an even number of rows");
  if (weight_dtype == int64_t(DType::I8) && !scale) throw std::invalid_argument("int8 weights need scales");
  w->pairs = DType(act_dtype) == DType::BF16 ? 2 : 1;
  w->granule = w->pairs;
  w->bounds.assign(bounds, bounds + n_bounds);
  if (scale) w->scale.assign(scale, scale + n);
  plan(*w, first, total);
  const int64_t columns = gated ? (n / 2 + 31) / 32 * PANEL : n;
  w->panels = (columns + PANEL - 1) / PANEL;
  w->memory = std::make_unique<HugeBuffer>(size_t(w->panels * w->panel_bytes()));
  std::vector<int64_t> row_at(size_t(w->panels * PANEL), -1);
  for (int64_t r = 0; r < n; r++) row_at[size_t(w->column(r))] = r;
  const Source source{static_cast<const char*>(src), DType(src_dtype), ld};
  team().run([&](Lane& lane) {
    for (int64_t p = lane.first(w->panels); p < lane.last(w->panels); p++) {
      char* panel = w->memory->data() + p * w->panel_bytes();
      memset(panel, 0, size_t(w->panel_bytes()));
      for (int64_t c = 0; c < PANEL; c++)
        if (int64_t r = row_at[size_t(p * PANEL + c)]; r >= 0) {
          if (source.type == w->type && w->pairs == 2) put_pairs(*w, source, r, panel, c);
          else put(*w, source, r, panel, c);
        }
    }
  });
  return w.release();
}
void packed_free(Packed* w) { delete w; }
int64_t packed_bytes(Packed* w) { return int64_t(w->memory->bytes()) + int64_t(w->scale.size() * 4); }
const void* packed_data(Packed* w) { return w->memory->data(); }
int64_t packed_subtrees_of(Packed* w) { return w->subtrees; }
const float* packed_scale_of(Packed* w) { return w->scale.empty() ? nullptr : w->scale.data(); }
void packed_row_to(Packed* w, int64_t row, int64_t dtype, void* out) { packed_row(*w, row, DType(dtype), out); }

}  // namespace

void packed_row(const Packed& w, int64_t row, DType out_type, void* out) {
  const int64_t column = w.column(row), c = column % PANEL;
  const char* panel = w.panel(column / PANEL);
  dispatch(out_type, [&](auto t) {
    using T = decltype(t);
    for (size_t a = 0; a + 1 < w.bounds.size(); a++)
      for (int64_t k = w.bounds[a]; k < w.bounds[a + 1]; k++) {
        const int64_t from = w.offset(w.starts[a] + k - w.bounds[a], c);
        T* to = static_cast<T*>(out) + k;
        if (w.type == out_type) {
          *to = reinterpret_cast<const T*>(panel)[from];
          continue;
        }
        float v = 0.f;
        if (w.type == DType::F32) v = reinterpret_cast<const float*>(panel)[from];
        else if (w.type == DType::BF16) v = to_float(reinterpret_cast<const bf16*>(panel)[from]);
        else if (w.type == DType::F16) v = to_float(reinterpret_cast<const f16*>(panel)[from]);
        else v = float(reinterpret_cast<const int8_t*>(panel)[from]) * w.scale[size_t(row)];
        store_n(to, splat(v), 1);
      }
  });
}

extern const std::vector<PyMethodDef> packed_methods;
const std::vector<PyMethodDef> packed_methods = {
    BIND(packed_new),      BIND(packed_free),     BIND(packed_bytes), BIND(packed_data),
    BIND(packed_subtrees_of), BIND(packed_scale_of), BIND(packed_row_to),
};

}  // namespace lockstep
