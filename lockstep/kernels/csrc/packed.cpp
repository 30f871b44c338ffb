// Packing a weight, and reading a row back.
#include <algorithm>
#include <memory>
#include <type_traits>

#include "bind.h"
#include "hugepages.h"
#include "packed.h"

namespace lockstep {

Packed::~Packed() { huge_free(data); }

int64_t packed_n(const Packed& w) { return w.n; }
int64_t packed_subtrees(const Packed& w) { return w.subtrees; }
bool packed_scaled(const Packed& w) { return !w.scale.empty(); }
const float* packed_scale(const Packed& w) { return w.scale.empty() ? nullptr : w.scale.data(); }

namespace {

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("a weight cannot be packed: ") + what);
}

// Walks the tree over [lo, hi) as far as it lies inside the run [first, stop) and counts, at each atom of the run, the nodes
// that end there. `subtrees` counts the maximal ones.
struct Tree {
  int64_t first, stop;
  std::vector<Atom>& atoms;
  int64_t subtrees = 0;

  void visit(int64_t lo, int64_t hi, bool inside) {
    if (hi <= first || stop <= lo) return;
    if (!inside && first <= lo && hi <= stop) inside = true, subtrees++;
    if (hi - lo == 1) return;
    int64_t half = 1;
    while (half * 2 < hi - lo) half *= 2;
    visit(lo, lo + half, inside);
    visit(lo + half, hi, inside);
    if (inside) atoms[size_t(hi - 1 - first)].merges++;
  }
};

void cut_atoms(Packed& w, const int64_t* bounds, int64_t count, int64_t first, int64_t total) {
  int64_t granule = w.type == DType::BF16 || w.type == DType::I8 ? PAIR_GRANULE : 1;
  require(count >= 1 && first >= 0 && first + count <= total, "the run of atoms does not lie within the total");
  require(bounds[0] == 0 && bounds[count] == w.k, "the atoms do not cover the columns");
  for (int64_t i = 0; i < count; i++) {
    int64_t size = bounds[i + 1] - bounds[i], padded = (size + granule - 1) / granule * granule;
    require(size > 0, "an atom is empty");
    w.atoms.push_back({bounds[i], size, w.kp, padded});
    w.kp += padded;
    w.gaps |= padded != size;
  }
  Tree tree{first, first + count, w.atoms};
  tree.visit(0, total, false);
  w.subtrees = tree.subtrees;
  int64_t now = 0;
  for (const Atom& a : w.atoms) w.depth = std::max(w.depth, ++now), now -= a.merges;
}

// 16 source elements, or the first n, as bits of the stored type.
template <class From>
void convert(const From* p, int64_t n, DType to, float scale, char* out) {
  for (int64_t i = 0; i < n; i += W) {
    f32x16 v = load_n(p + i, n - i);
    if (to == DType::F32) store_n(reinterpret_cast<float*>(out) + i, v, n - i);
    if (to == DType::BF16) store_n(reinterpret_cast<bf16*>(out) + i, v, n - i);
    if (to == DType::F16) store_n(reinterpret_cast<f16*>(out) + i, v, n - i);
    if (to != DType::I8) continue;
    for (int64_t j = 0; j < std::min<int64_t>(W, n - i); j++) {
      float q = scale > 0.f ? std::nearbyint(v[j] / scale) : 0.f;
      out[i + j] = char(int8_t(std::min(std::max(q, -127.f), 127.f)));
    }
  }
}

struct Source {
  const char* data;
  DType type;
  int64_t ld;
  const float* scale;  // int8: of each row

  // Columns [k, k + n) of a row, as the stored type.
  void read(int64_t row, int64_t k, int64_t n, DType to, char* out) const {
    const char* p = data + (row * ld + k) * itemsize(type);
    if (type == to) memcpy(out, p, size_t(n * itemsize(to)));
    else dispatch(type, [&](auto tag) { convert(reinterpret_cast<const decltype(tag)*>(p), n, to, scale ? scale[row] : 1.f, out); });
  }
};

constexpr int64_t CHUNK = 64;  // columns packed at once: their 64 rows fit the L1 cache

// part: [64 columns][CHUNK] elements -> out: [units][64], a unit being one element, or a pair.
template <class U>
void transpose(const char* part, int64_t units, int64_t row_units, char* out) {
  const U* from = reinterpret_cast<const U*>(part);
  U* to = reinterpret_cast<U*>(out);
  for (int64_t u = 0; u < units; u++)
    for (int64_t c = 0; c < PANEL; c++) to[u * PANEL + c] = from[c * row_units + u];
}

void pack_chunk(const Packed& w, const Source& src, int64_t p, const Atom& a, int64_t begin, char* panel) {
  alignas(64) char part[PANEL * CHUNK * 4] = {};
  int64_t size = itemsize(w.type), filled = std::min(CHUNK, a.size - begin), length = std::min(CHUNK, a.padded - begin);
  for (int64_t c = 0; c < PANEL; c++)
    if (int64_t row = w.source(p, c); row >= 0 && filled > 0) src.read(row, a.from + begin, filled, w.type, part + c * CHUNK * size);
  char* out = panel + w.offset(a.at + begin);
  int64_t unit = size * (w.pairs ? 2 : 1), units = length / (w.pairs ? 2 : 1), row_units = CHUNK / (w.pairs ? 2 : 1);
  if (unit == 4) transpose<uint32_t>(part, units, row_units, out);
  else transpose<uint16_t>(part, units, row_units, out);
}

void pack_panel(const Packed& w, const Source& src, int64_t p) {
  for (const Atom& a : w.atoms)
    for (int64_t begin = 0; begin < a.padded; begin += CHUNK) pack_chunk(w, src, p, a, begin, w.data + p * w.panel_bytes);
}

Packed* pack(const Source& source, int64_t n, int64_t k, DType type, const int64_t* bounds, int64_t atoms, int64_t first, int64_t total, bool gated) {
  const float* scale = source.scale;
  require(n >= 1 && k >= 1 && source.ld >= k, "the weight is empty, or its rows overlap");
  require(!gated || n % 2 == 0, "a gated weight has as many gate rows as up rows");
  require((type == DType::I8) == (scale != nullptr), "int8 weights need a scale, others have none");
  require(source.type != DType::I8 || type == DType::I8, "int8 weights stay int8");
  auto w = std::make_unique<Packed>();
  w->n = n, w->k = k, w->type = type, w->gated = gated;
  w->pairs = type == DType::BF16 || type == DType::I8;
  cut_atoms(*w, bounds, atoms, first, total);
  w->panels = gated ? (n / 2 + HALF - 1) / HALF : (n + PANEL - 1) / PANEL;
  w->panel_bytes = w->offset(w->kp);
  w->data = static_cast<char*>(huge_alloc(size_t(w->panels * w->panel_bytes)));
  if (scale) {
    w->scale.resize(size_t(w->panels * PANEL));
    for (int64_t i = 0; i < w->panels * PANEL; i++)
      if (int64_t row = w->source(i / PANEL, i % PANEL); row >= 0) w->scale[size_t(i)] = scale[row];
  }
  team().run([&](Lane& lane) {  // each thread touches first what it will read
    for (int64_t p = lane.first(w->panels); p < lane.last(w->panels); p++) pack_panel(*w, source, p);
  });
  return w.release();
}

Packed* packed_new(const void* src, int64_t src_dtype, int64_t n, int64_t k, int64_t ld, int64_t weight_dtype, const int64_t* bounds,
                   int64_t n_bounds, int64_t first_atom, int64_t total_atoms, bool gated, const float* scale) {
  Source source{static_cast<const char*>(src), DType(src_dtype), ld, scale};
  return pack(source, n, k, DType(weight_dtype), bounds, n_bounds - 1, first_atom, total_atoms, gated);
}
void packed_free(Packed* w) { delete w; }
int64_t packed_bytes(const Packed* w) { return w->panels * w->panel_bytes + (w->scale.empty() ? 0 : w->n * 4); }
int64_t packed_subtrees_of(const Packed* w) { return w->subtrees; }
const float* packed_scale_of(const Packed* w) { return packed_scale(*w); }
void packed_row_to(const Packed* w, int64_t row, int64_t dtype, void* out) {
  require(row >= 0 && row < w->n, "the weight has no such row");
  packed_row(*w, row, DType(dtype), out);
}

}  // namespace

std::unique_ptr<Packed> pack_bf16(const void* src, int64_t n, int64_t k, const int64_t* bounds, int64_t atoms) {
  return std::unique_ptr<Packed>(pack({static_cast<const char*>(src), DType::BF16, k, nullptr}, n, k, DType::BF16, bounds, atoms, 0, atoms, false));
}

void packed_row(const Packed& w, int64_t n, DType out_type, void* out) {
  int64_t half = w.n / 2, row = w.gated ? n % half : n, width = w.gated ? HALF : PANEL, unit = w.pairs ? 2 : 1;
  int64_t column = row % width + (w.gated && n >= half ? HALF : 0);
  const char* panel = w.panel(row / width);
  float scale = w.scale.empty() ? 1.f : w.scale[size_t(row / width * PANEL + column)];
  auto unpack = [&](auto stored, auto result) {
    auto* to = static_cast<decltype(result)*>(out);
    for (const Atom& a : w.atoms)
      for (int64_t k = 0; k < a.size; k += W) {
        float part[W];
        for (int64_t i = 0; i < W; i++) {
          int64_t at = std::min(a.at + k + i, w.kp - 1);
          memcpy(&stored, panel + (at / unit * PANEL * unit + column * unit + at % unit) * int64_t(sizeof stored), sizeof stored);
          if constexpr (std::is_same_v<decltype(stored), int8_t>) part[i] = float(stored) * scale;
          else part[i] = to_float(stored);
        }
        store_n(to + a.from + k, load(part), a.size - k);
      }
  };
  dispatch(out_type, [&](auto result) {
    if (w.type == DType::I8) unpack(int8_t{}, result);
    else dispatch(w.type, [&](auto stored) { unpack(stored, result); });
  });
}

extern const std::vector<PyMethodDef> packed_methods;
const std::vector<PyMethodDef> packed_methods = {
    BIND(packed_new),      BIND(packed_free),   BIND(packed_bytes), BIND(packed_subtrees_of),
    BIND(packed_scale_of), BIND(packed_row_to), BIND(huge_used),    BIND(huge_granted),
};

}  // namespace lockstep
