#include "hugepages.h"

#include <algorithm>
#include <cassert>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lockstep {

namespace {

constexpr size_t PAGE = 4096, HUGE = size_t(2) << 20, BLOCK = size_t(64) << 20;

struct Block {
  char* map;  // as the system gave it
  size_t mapped;
  char* base;  // aligned to a huge page
  size_t size, used = 0, live = 0;  // bytes; bytes carved; pieces not freed
};

std::mutex lock;
std::vector<Block> blocks;
std::map<void*, size_t> pieces;  // bytes of each

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

#if defined(__linux__)
// Untouched parts of a block cost no memory.
Block block_new(size_t bytes) {
  Block b;
  b.size = round_up(bytes, HUGE);
  b.mapped = b.size + HUGE;
  void* p = mmap(nullptr, b.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  b.map = static_cast<char*>(p);
  b.base = reinterpret_cast<char*>(round_up(reinterpret_cast<size_t>(p), HUGE));
  madvise(b.base, b.size, MADV_HUGEPAGE);  // refused: ordinary pages
  return b;
}
void block_free(const Block& b) { munmap(b.map, b.mapped); }
#else
Block block_new(size_t bytes) {
  Block b;
  b.size = b.mapped = round_up(bytes, PAGE);
  b.map = b.base = static_cast<char*>(aligned_alloc(PAGE, b.size));
  if (!b.map) throw std::bad_alloc();
  memset(b.map, 0, b.size);
  return b;
}
void block_free(const Block& b) { free(b.map); }
#endif

bool holds(const Block& b, const void* p) { return p >= b.base && p < b.base + b.size; }

}  // namespace

void* huge_alloc(size_t bytes) {
  bytes = round_up(std::max(bytes, size_t(1)), PAGE);
  std::lock_guard<std::mutex> hold(lock);
  auto fits = [&](const Block& b) { return b.size - b.used >= bytes; };
  auto b = std::find_if(blocks.begin(), blocks.end(), fits);
  if (b == blocks.end()) b = blocks.insert(blocks.end(), block_new(std::max(bytes, BLOCK)));
  char* p = b->base + b->used;
  pieces[p] = bytes;
  b->used += bytes;
  b->live++;
  return p;
}

void huge_free(void* p) {
  if (!p) return;
  std::lock_guard<std::mutex> hold(lock);
  auto b = std::find_if(blocks.begin(), blocks.end(), [&](const Block& x) { return holds(x, p); });
  assert(b != blocks.end() && pieces.count(p));
  pieces.erase(p);
  if (--b->live == 0) {
    block_free(*b);
    blocks.erase(b);
  }
}

int64_t huge_used() {
  std::lock_guard<std::mutex> hold(lock);
  int64_t sum = 0;
  for (auto& [p, bytes] : pieces) sum += int64_t(bytes);
  return sum;
}

int64_t huge_granted() {
  FILE* maps = fopen("/proc/self/smaps", "r");
  if (!maps) return -1;
  std::lock_guard<std::mutex> hold(lock);
  int64_t sum = 0;
  bool ours = false;
  char line[512];
  while (fgets(line, sizeof line, maps)) {
    uint64_t from, to, kib;
    if (sscanf(line, "%" SCNx64 "-%" SCNx64 " ", &from, &to) == 2) {
      auto overlaps = [&](const Block& b) { return uint64_t(b.base) < to && from < uint64_t(b.base + b.size); };
      ours = std::any_of(blocks.begin(), blocks.end(), overlaps);
    } else if (ours && sscanf(line, "AnonHugePages: %" SCNu64 " kB", &kib) == 1) {
      sum += int64_t(kib) << 10;
    }
  }
  fclose(maps);
  return sum;
}

}  // namespace lockstep
