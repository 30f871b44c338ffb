// The kernel of AMX: tiles of 16 rows by 16 columns, one chain of tile products along k.
#include "amx.h"
#include "gemm_pairs.h"

#if defined(LOCKSTEP_TILES)

namespace lockstep {

const bool has_pair_kernel = true;

namespace {

constexpr int64_t HEIGHT = 16, STEP = 32;                     // rows of a tile; k of one tile product
constexpr int64_t BLOCK_STRIDE = 4 * PANEL, SUM_STRIDE = 4 * PANEL;  // bytes between pairs of k in a panel, between rows of sums

struct Tiles {
  using Row = bf16;
  static constexpr bool FUSES = false;
  int64_t top = 0, bottom = 0;  // rows of the tiles as configured

  Tiles() = default;
  Tiles(const Tiles&) = delete;
  ~Tiles() {
    if (top) TILE_RELEASE();
  }

  int64_t row_block(const Packed& w) const { return std::min<int64_t>(std::max<int64_t>((768 << 10) / (w.kp * 2) / 32 * 32, 128), 512); }
  int64_t k_block(const Packed&, int64_t) const { return 1024; }
  const bf16* rows(const Packed& w, const Rows& a, int64_t first, int64_t count, int64_t* ld) const { return pair_rows(w, a, first, count, ld); }

  // Sums in tiles 0 and 1 (rows at the top) and 2 and 3, rows in 4 and 5, weights in 6 and 7; a single row of tiles: sums in
  // 0 to 3, rows in 4, weights in 6 and 7 by turns.
  void configure(int64_t new_top, int64_t new_bottom) {
    if (new_top == top && new_bottom == bottom) return;
    top = new_top, bottom = new_bottom;
    TileConfig config;
    for (int tile : {0, 1, 4}) config.set(tile, top);
    for (int tile : {2, 3}) config.set(tile, bottom ? bottom : top);
    config.set(5, bottom);
    for (int tile : {6, 7}) config.set(tile, HEIGHT);
    TILE_FENCE();
    TILE_CONFIG(config);
  }

  // Up to 16 rows by the panel's 64 columns.
  static void low(const char* w, int64_t k, const bf16* a, int64_t lda, float* c, bool fresh, Prefetch& prefetch, int64_t lines) {
    if (fresh) {
      TILE_ZERO(0); TILE_ZERO(1); TILE_ZERO(2); TILE_ZERO(3);
    } else {
      TILE_LOAD(0, c, SUM_STRIDE); TILE_LOAD(1, c + 16, SUM_STRIDE); TILE_LOAD(2, c + 32, SUM_STRIDE); TILE_LOAD(3, c + 48, SUM_STRIDE);
    }
    for (; k > 0; k -= STEP, a += STEP, w += STEP / 2 * BLOCK_STRIDE) {
      prefetch.lines(lines);
      TILE_LOAD(4, a, lda * 2);
      TILE_LOAD(6, w, BLOCK_STRIDE);
      TILE_DOT(0, 4, 6);
      TILE_LOAD(7, w + 64, BLOCK_STRIDE);
      TILE_DOT(1, 4, 7);
      TILE_LOAD(6, w + 128, BLOCK_STRIDE);
      TILE_DOT(2, 4, 6);
      TILE_LOAD(7, w + 192, BLOCK_STRIDE);
      TILE_DOT(3, 4, 7);
    }
    TILE_STORE(0, c, SUM_STRIDE); TILE_STORE(1, c + 16, SUM_STRIDE); TILE_STORE(2, c + 32, SUM_STRIDE); TILE_STORE(3, c + 48, SUM_STRIDE);
  }

  // 17 to 32 rows by 32 columns: every tile that is loaded is used twice.
  static void high(const char* w, int64_t k, const bf16* a, int64_t lda, float* c, bool fresh, Prefetch& prefetch, int64_t lines) {
    float* below = c + HEIGHT * PANEL;
    if (fresh) {
      TILE_ZERO(0); TILE_ZERO(1); TILE_ZERO(2); TILE_ZERO(3);
    } else {
      TILE_LOAD(0, c, SUM_STRIDE); TILE_LOAD(1, c + 16, SUM_STRIDE); TILE_LOAD(2, below, SUM_STRIDE); TILE_LOAD(3, below + 16, SUM_STRIDE);
    }
    for (; k > 0; k -= STEP, a += STEP, w += STEP / 2 * BLOCK_STRIDE) {
      prefetch.lines(lines);
      TILE_LOAD(4, a, lda * 2);
      TILE_LOAD(6, w, BLOCK_STRIDE);
      TILE_DOT(0, 4, 6);
      TILE_LOAD(7, w + 64, BLOCK_STRIDE);
      TILE_DOT(1, 4, 7);
      TILE_LOAD(5, a + HEIGHT * lda, lda * 2);
      TILE_DOT(2, 5, 6);
      TILE_DOT(3, 5, 7);
    }
    TILE_STORE(0, c, SUM_STRIDE); TILE_STORE(1, c + 16, SUM_STRIDE); TILE_STORE(2, below, SUM_STRIDE); TILE_STORE(3, below + 16, SUM_STRIDE);
  }

  void block(const Packed& w, const char* weights, int64_t k, const bf16* a, int64_t lda, int64_t m, float* c, bool fresh) {
    int64_t bytes = k * PANEL * itemsize(w.type), parts = (m + 2 * HEIGHT - 1) / (2 * HEIGHT);
    Prefetch prefetch(weights + bytes, bytes);
    int64_t lines = prefetch.share(k / STEP * parts);
    if (w.type == DType::I8) weights = unpack_int8(weights, k, scratches().weights.get<char>(k * PANEL * 2));
    TILE_FENCE();
    for (int64_t row = 0; row < m; row += 2 * HEIGHT) {
      const bf16* x = a + row * lda;
      float* sums = c + row * PANEL;
      int64_t count = std::min(m - row, 2 * HEIGHT);
      configure(std::min(count, HEIGHT), std::max<int64_t>(count - HEIGHT, 0));
      if (count <= HEIGHT) {
        low(weights, k, x, lda, sums, fresh, prefetch, lines);
      } else {
        high(weights, k, x, lda, sums, fresh, prefetch, (lines + 1) / 2);
        high(weights + 128, k, x, lda, sums + 32, fresh, prefetch, (lines + 1) / 2);
      }
    }
    TILE_FENCE();
  }
};

}  // namespace

void gemm_pairs(const Packed& w, const Rows& a, int64_t m, const Sink& sink, Lane& lane) { PanelLoop<Tiles>(w, a, sink).run(m, lane); }

}  // namespace lockstep

#endif
