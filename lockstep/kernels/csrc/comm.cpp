// Collectives over a group's shared memory. Sums are taken in float32 by one tree over ranks, and rounded once.
#include "comm.h"

#include <algorithm>

#include "bind.h"
#include "comm_shm.h"
#include "simd.h"
#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace lockstep {

Group* group_of(void* handle) { return static_cast<Group*>(handle); }

namespace {

// What a sync is for: part of its tag, so that ranks in different collectives are told apart. Programs use 1 << 16 and up.
enum Kind : uint64_t { BARRIER = 1, REDUCE, SCATTER, SHARE, GATHER, BROADCAST };
uint64_t tag(Kind kind, int64_t bytes) { return uint64_t(kind) << 32 | (uint64_t(bytes) & 0xffffffffu); }

// ---- sums ----------------------------------------------------------------------------------------------------------
// The tree over ranks that splits at the largest power of two, as a running stack: after item i, the two on top are added
// once for each trailing 1 bit of i; what is left at the end is added from the top.
template <class V, class Load>
LS_INLINE V tree_sum(int n, const Load& item) {
  if (n == 2) return item(0) + item(1);
  V stack[16];
  int top = 0;
  for (int i = 0; i < n; i++) {
    stack[top++] = item(i);
    for (int bits = i; bits & 1; bits >>= 1) stack[top - 2] = stack[top - 2] + stack[top - 1], top--;
  }
  while (top > 1) stack[top - 2] = stack[top - 2] + stack[top - 1], top--;
  return stack[0];
}

template <class T>
void sum_floats(T* out, const T* const* parts, int n, int64_t count) {
  for (int64_t j = 0; j < count; j += W) {
    const int64_t some = std::min<int64_t>(W, count - j);
    if (some == W) store(out + j, tree_sum<f32x16>(n, [&](int r) { return load(parts[r] + j); }));
    else store_n(out + j, tree_sum<f32x16>(n, [&](int r) { return load_n(parts[r] + j, some); }), some);
  }
}
template <class T>
void sum_plain(T* out, const T* const* parts, int n, int64_t count) {
  for (int64_t j = 0; j < count; j++) out[j] = T(tree_sum<T>(n, [&](int r) { return parts[r][j]; }));
}

constexpr int MOST_RANKS = 64;

// dtype: simd.h's numbers, and 4 double, 5 uint8 or bool as numbers, 6 int16, 7 int32, 8 int64.
void sum_any(int64_t dtype, void* out, const char* const* parts, int n, int64_t count) {
  auto with = [&](auto sum, auto t) {
    using T = decltype(t);
    const T* typed[MOST_RANKS];
    for (int r = 0; r < n; r++) typed[r] = reinterpret_cast<const T*>(parts[r]);
    sum(static_cast<T*>(out), typed, n, count);
  };
  switch (dtype) {
    case 0: return with(sum_floats<float>, float{});
    case 1: return with(sum_floats<bf16>, bf16{});
    case 2: return with(sum_floats<f16>, f16{});
    case 3: return with(sum_plain<int8_t>, int8_t{});
    case 4: return with(sum_plain<double>, double{});
    case 5: return with(sum_plain<uint8_t>, uint8_t{});
    case 6: return with(sum_plain<int16_t>, int16_t{});
    case 7: return with(sum_plain<int32_t>, int32_t{});
    case 8: return with(sum_plain<int64_t>, int64_t{});
    default: throw std::invalid_argument("sums of this type are not known");
  }
}

constexpr int64_t TWO_SHOT_BYTES = 64 << 10;  // with more than two ranks: above, each sums its part
constexpr int64_t CHUNK_BYTES = 512 << 10;    // of a large message: what is written is still in cache when it is read

void one_shot(Group& g, char* x, int64_t count, int64_t size, int64_t dtype) {
  memcpy(g.slot(g.rank), x, size_t(count * size));
  g.sync(tag(REDUCE, count * size));
  const char* parts[MOST_RANKS];
  for (int r = 0; r < g.world; r++) parts[r] = r == g.rank ? x : g.slot_after(r);
  sum_any(dtype, x, parts, g.world, count);
}

void two_shot(Group& g, char* x, int64_t count, int64_t size, int64_t dtype) {
  auto begin = [&](int r) { return count * r / g.world; };
  char* mine = g.slot(g.rank);
  for (int r = 0; r < g.world; r++)
    if (r != g.rank) memcpy(mine + begin(r) * size, x + begin(r) * size, size_t((begin(r + 1) - begin(r)) * size));
  g.sync(tag(SCATTER, count * size));
  const int64_t at = begin(g.rank), some = begin(g.rank + 1) - at;
  const char* parts[MOST_RANKS];
  for (int r = 0; r < g.world; r++) parts[r] = (r == g.rank ? x : g.slot_after(r)) + at * size;
  char* result = g.slot(g.rank);
  sum_any(dtype, result, parts, g.world, some);
  memcpy(x + at * size, result, size_t(some * size));
  g.sync(tag(SHARE, count * size));
  for (int r = 0; r < g.world; r++)
    if (r != g.rank) memcpy(x + begin(r) * size, g.slot_after(r), size_t((begin(r + 1) - begin(r)) * size));
}

int64_t chunk_bytes(const Group& g) { return std::min<int64_t>(CHUNK_BYTES, int64_t(g.slot_bytes)); }

// ---- what Python calls ---------------------------------------------------------------------------------------------
int64_t shm_create(int64_t world, int64_t slot_bytes) {
#if defined(__linux__)
  const int fd = memfd_create("lockstep-group", MFD_CLOEXEC);
  if (fd < 0 || fchmod(fd, 0600) != 0 || ftruncate(fd, off_t(ShmGroup::segment_bytes(int(world), size_t(slot_bytes)))) != 0)
    throw std::runtime_error("shared memory for a group could not be made");
  return fd;
#else
  throw std::runtime_error("shared memory groups need Linux");
#endif
}
int64_t shm_open_path(const char* path) {
  const int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) throw std::runtime_error(std::string(path) + " could not be opened: " + strerror(errno));
  return fd;
}
Group* shm_attach(int64_t fd, int64_t rank, int64_t world, int64_t slot_bytes, double timeout_s) {
  if (world > MOST_RANKS) throw std::invalid_argument("a shared-memory group has at most 64 ranks");
  return new ShmGroup(int(fd), int(rank), int(world), size_t(slot_bytes), timeout_s);
}
void shm_free(Group* g) { delete g; }
void shm_barrier(Group* g) { g->sync(tag(BARRIER, 0)); }

void shm_all_reduce(Group* g, char* x, int64_t count, int64_t size, int64_t dtype) {
  const bool split = g->world > 2 && count * size > TWO_SHOT_BYTES;
  const int64_t most = chunk_bytes(*g) / size;
  for (int64_t at = 0; at < count; at += most) {
    const int64_t some = std::min(most, count - at);
    if (split) two_shot(*g, x + at * size, some, size, dtype);
    else one_shot(*g, x + at * size, some, size, dtype);
  }
}

// Every rank's `bytes` at src to dst [world][bytes]; dst null: this rank only gives.
void shm_gather(Group* g, const void* from, int64_t bytes, char* dst) {
  const char* src = static_cast<const char*>(from);
  for (int64_t at = 0; at < bytes; at += chunk_bytes(*g)) {
    const int64_t some = std::min(chunk_bytes(*g), bytes - at);
    memcpy(g->slot(g->rank), src + at, size_t(some));
    g->sync(tag(GATHER, some));
    if (!dst) continue;
    for (int r = 0; r < g->world; r++) memcpy(dst + r * bytes + at, r == g->rank ? src + at : g->slot_after(r), size_t(some));
  }
}

void shm_broadcast(Group* g, char* x, int64_t bytes, int64_t src) {
  for (int64_t at = 0; at < bytes; at += chunk_bytes(*g)) {
    const int64_t some = std::min(chunk_bytes(*g), bytes - at);
    if (g->rank == src) memcpy(g->slot(g->rank), x + at, size_t(some));
    g->sync(tag(BROADCAST, some));
    if (g->rank != src) memcpy(x + at, g->slot_after(int(src)), size_t(some));
  }
}

}  // namespace

extern const std::vector<PyMethodDef> comm_methods;
const std::vector<PyMethodDef> comm_methods = {
    BIND(shm_create), BIND(shm_open_path), BIND(shm_attach),    BIND(shm_free),
    BIND(shm_barrier), BIND(shm_all_reduce), BIND(shm_gather), BIND(shm_broadcast),
};

}  // namespace lockstep
