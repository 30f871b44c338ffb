#include "amx.h"

#if defined(LOCKSTEP_TILES)
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lockstep {

bool amx_request() {
#if defined(LOCKSTEP_EMULATE_AMX)
  return true;
#else
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // Linux: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
#endif
}

#if defined(LOCKSTEP_EMULATE_AMX)
namespace emulated {

namespace {

struct Tiles {
  TileConfig config;
  bool on = false;
  alignas(64) char data[8][16][64];
};
thread_local Tiles tiles;

// As the processor faults where a tile is used that is not configured.
int rows_of(int tile) {
  if (!tiles.on || tiles.config.rows[tile] < 1 || tiles.config.rows[tile] > 16) throw std::logic_error("a tile is used that is not configured");
  return tiles.config.rows[tile];
}

// Subnormal numbers count as zero.
f32x16 flushed(f32x16 x) {
  u32x16 bits = as<u32x16>(x);
  return (bits & 0x7f800000u) == 0u ? as<f32x16>(bits & 0x80000000u) : x;
}

}  // namespace

void load_config(const TileConfig& config) {
  tiles.config = config;
  tiles.on = true;
  memset(tiles.data, 0, sizeof tiles.data);
}
void release() { tiles.on = false; }
void zero(int tile) {
  rows_of(tile);
  memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}
void load(int tile, const void* p, int64_t stride) {
  int rows = rows_of(tile);
  memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
  for (int r = 0; r < rows; r++) memcpy(tiles.data[tile][r], static_cast<const char*>(p) + r * stride, 64);
}
void store(int tile, void* p, int64_t stride) {
  for (int r = 0, rows = rows_of(tile); r < rows; r++) memcpy(static_cast<char*>(p) + r * stride, tiles.data[tile][r], 64);
}

// Intel's description of TDPBF16PS: for each pair of k, first the even product is added, then the odd one.
void dot(int sums, int a, int b) {
  int pairs = rows_of(b);
  if (rows_of(a) != rows_of(sums)) throw std::logic_error("tiles of different heights are multiplied");
  for (int r = 0, rows = rows_of(sums); r < rows; r++) {
    f32x16 sum = load_raw<f32x16>(tiles.data[sums][r]);
    for (int k = 0; k < pairs; k++) {
      u32x16 x = splat_u32(load_raw<uint32_t>(tiles.data[a][r] + 4 * k)), y = load_raw<u32x16>(tiles.data[b][k]);
      sum = flushed(fma(flushed(as<f32x16>(x << 16)), flushed(as<f32x16>(y << 16)), sum));
      sum = flushed(fma(flushed(as<f32x16>(x & 0xffff0000u)), flushed(as<f32x16>(y & 0xffff0000u)), sum));
    }
    store_raw(tiles.data[sums][r], sum);
  }
}

}  // namespace emulated
#endif

}  // namespace lockstep

#endif
