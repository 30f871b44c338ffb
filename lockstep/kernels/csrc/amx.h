// Intel's tile unit (AMX), or, for tests, its instructions in plain code: the same kernel compiles with either.
//
// A tile is up to 16 rows of 64 bytes. TILE_DOT adds to a tile of float32 the product of two tiles of bfloat16, the second
// in pairs of rows. Their names are numbers written out, because the compiler puts them into the instruction.
#pragma once
#include <cstdint>

#if defined(__AMX_BF16__) || defined(LOCKSTEP_EMULATE_AMX)
#define LOCKSTEP_TILES 1
#include "simd.h"

namespace lockstep {

// Asks the system, once per process, for leave to use the tile registers. Without it their first use ends the process.
bool amx_request();

struct alignas(64) TileConfig {  // as the instruction reads it
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a tile's rows
  uint8_t rows[16] = {};
  void set(int tile, int64_t n) { rows[tile] = uint8_t(n), bytes[tile] = n ? 64 : 0; }
};

}  // namespace lockstep

#if defined(LOCKSTEP_EMULATE_AMX)
namespace lockstep::emulated {
void load_config(const TileConfig& config);
void release();
void zero(int tile);
void load(int tile, const void* p, int64_t stride);
void store(int tile, void* p, int64_t stride);
void dot(int sums, int a, int b);
}  // namespace lockstep::emulated
#define TILE_CONFIG(c) ::lockstep::emulated::load_config(c)
#define TILE_RELEASE() ::lockstep::emulated::release()
#define TILE_ZERO(t) ::lockstep::emulated::zero(t)
#define TILE_LOAD(t, p, stride) ::lockstep::emulated::load(t, p, stride)
#define TILE_STORE(t, p, stride) ::lockstep::emulated::store(t, p, stride)
#define TILE_DOT(c, a, b) ::lockstep::emulated::dot(c, a, b)
#else
#include <immintrin.h>
#define TILE_CONFIG(c) _tile_loadconfig(&(c))
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#endif
// The compiler does not know that these read memory: what was written must be written before them.
#define TILE_FENCE() asm volatile("" ::: "memory")

#endif
