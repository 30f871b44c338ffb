// The kernel of AVX512-BF16: one instruction adds the products of a pair of k to a float32 sum.
#include "amx.h"
#include "gemm_pairs.h"

#if defined(LOCKSTEP_TILES)
// gemm_tiles.cpp has the kernel.
#elif defined(__AVX512BF16__)

namespace lockstep {

const bool has_pair_kernel = true;

namespace {

constexpr int MOST = 6, NV = 4;  // a tile: rows, vectors of 16 columns

LS_INLINE __m512bh pair(const bf16* a) { return (__m512bh)_mm512_set1_epi32(load_raw<int32_t>(a)); }

struct Sums {  // of a tile
  float* c;
  bool fresh;  // they begin here
  int64_t merges, stride;  // how many sums before them they are added to, `stride` floats apart
  float* out;  // where they go then; null: to the place of the last of those
};

// Sums [M][64] (= or +=) a [M][k] times the block. ALONE: this tile fetches all of the next block, else `lines` with every step.
template <class Weight, int M, bool ALONE>
void tile(const char* w, int64_t steps, const bf16* a, int64_t lda, Sums to, Prefetch& prefetch, int64_t lines) {
  __m512 sums[M][NV];
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sums[r][v] = to.fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(to.c + r * PANEL + v * W);
  for (int64_t s = 0; s < steps; s++, w += Weight::BYTES, a += 2) {
    if constexpr (ALONE) prefetch.step<Weight::BYTES>();
    else prefetch.lines(lines);
    __m512bh weights[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) weights[v] = Weight::get(w, v);
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      __m512bh x = pair(a + r * lda);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, weights[v]);
    }
  }
  for (; to.merges > 0; to.merges--) {
    to.c -= to.stride;
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) sums[r][v] = _mm512_add_ps(_mm512_loadu_ps(to.c + r * PANEL + v * W), sums[r][v]);
  }
  float* out = to.out ? to.out : to.c;
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) _mm512_storeu_ps(out + r * PANEL + v * W, sums[r][v]);
}

template <class Weight, bool ALONE, int M = MOST>
LS_INLINE void tile_of(int64_t rows, const char* w, int64_t steps, const bf16* a, int64_t lda, const Sums& to, Prefetch& prefetch, int64_t lines) {
  if constexpr (M > 0) {
    if (rows == M) tile<Weight, M, ALONE>(w, steps, a, lda, to, prefetch, lines);
    else tile_of<Weight, ALONE, M - 1>(rows, w, steps, a, lda, to, prefetch, lines);
  }
}

// The rows that follow those of now, of which every tile fetches some.
struct Ahead {
  Prefetch rows{nullptr, 0};
  int64_t lines = 0;
};

// The tiles of a block, which together fetch the block that follows it in memory.
template <class Weight>
void multiply(const char* w, int64_t k, const bf16* a, int64_t lda, int64_t m, float* c, bool fresh, const End& end, Prefetch prefetch, Ahead& ahead) {
  alignas(64) float finished[MOST * PANEL];
  each_tile(m, MOST, [&](int64_t row, int64_t rows, int64_t, int64_t tiles) {
    ahead.rows.lines(ahead.lines);
    Sums to{c + row * PANEL, fresh, end.merges, end.stride, end.alone ? finished : nullptr};
    if (tiles == 1) tile_of<Weight, true>(rows, w, k / 2, a, lda, to, prefetch, 0);
    else tile_of<Weight, false>(rows, w, k / 2, a + row * lda, lda, to, prefetch, prefetch.share(k / 2 * tiles));
    if (end.alone) end.take(row, rows, finished);
    else end.take(row, rows);
  });
}

struct Pairs {
  using Row = bf16;
  static constexpr bool FUSES = true;
  int64_t row_block(const Packed& w) const { return std::min<int64_t>(std::max<int64_t>((384 << 10) / (w.kp * 2), 96), 384); }
  // Short blocks where tiles read them again and the weights are worth more than the sums: they then find a block nearby while
  // the next one is on its way (measured at 8 rows, memory bound: 256 reads 15 % less a second than 32; of 24 to 48 rows
  // 256 are 5 % faster than 128, and blocks of 96 rows of a long prompt 12 % faster with 1024). A tile alone reads nothing
  // again: its sums stay in registers (one row, one thread: a tenth more a second than with blocks of 64).
  int64_t k_block(const Packed&, int64_t m) const { return m <= MOST ? 1024 : m <= 16 ? 32 : m <= 48 ? 256 : 1024; }

  const bf16* rows(const Packed& w, const Rows& a, int64_t first, int64_t count, int64_t* ld) const { return pair_rows(w, a, first, count, ld); }

  Ahead ahead;

  // Rows of long blocks come from far memory otherwise, for the first panel of each.
  void next_rows(const Packed& w, const Rows& a, int64_t first, int64_t count, int64_t now) {
    int64_t bytes = count * a.ld * 2, tiles = (now + MOST - 1) / MOST * w.panels * int64_t(w.atoms.size());
    ahead = {Prefetch(a.at(first), bytes), 0};
    ahead.lines = ahead.rows.share(tiles);
  }

  void block(const Packed& w, const char* weights, int64_t k, const bf16* a, int64_t lda, int64_t m, float* c, bool fresh, const End& end) {
    int64_t bytes = k * PANEL * itemsize(w.type);
    // A tile alone reads each line once and soon; more of them find the next block in a cache that this one does not fill.
    Prefetch prefetch(weights + (m <= MOST ? 4 << 10 : std::max<int64_t>(bytes, 8 << 10)), bytes);
    if (w.type == DType::BF16) return multiply<PairsBfloat16>(weights, k, a, lda, m, c, fresh, end, prefetch, ahead);
    if (m <= MOST) return multiply<PairsInt8>(weights, k, a, lda, m, c, fresh, end, prefetch, ahead);
    weights = unpack_int8(weights, k, scratches().weights.get<char>(k * PANEL * 2));
    multiply<PairsBfloat16>(weights, k, a, lda, m, c, fresh, end, prefetch, ahead);
  }
};

}  // namespace

void gemm_pairs(const Packed& w, const Rows& a, int64_t m, const Sink& sink, Lane& lane) { PanelLoop<Pairs>(w, a, sink).run(m, lane); }

}  // namespace lockstep

#else

namespace lockstep {
const bool has_pair_kernel = false;
void gemm_pairs(const Packed&, const Rows&, int64_t, const Sink&, Lane&) { throw std::logic_error("this library has no kernel for pairs"); }
}  // namespace lockstep

#endif
