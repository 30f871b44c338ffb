// What no product can beat on this machine: reading memory, and multiplying what is already in registers.
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include <cstddef>
#include <cstdint>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

extern "C" void* limits_buffer(int64_t bytes) {
  const size_t huge = 2 << 20;
  char* p = (char*)mmap(nullptr, (size_t)bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  p = (char*)(((size_t)p + huge - 1) / huge * huge);
  madvise(p, (size_t)bytes, MADV_HUGEPAGE);
  for (int64_t i = 0; i < bytes; i += 64) p[i] = 1;
  return p;
}

struct Part {
  const uint64_t* from;
  int64_t words;
  uint64_t sum;
};
static void* read_part(void* argument) {
  Part* part = (Part*)argument;
  typedef uint64_t v8 __attribute__((vector_size(64)));
  const v8* p = (const v8*)part->from;
  v8 a = {}, b = {}, c = {}, d = {};
  for (int64_t i = 0; i < part->words / 8; i += 4) {
    for (int j = 0; j < 4; j++) __builtin_prefetch(p + i + 64 + j, 0, 2);
    a += p[i], b += p[i + 1], c += p[i + 2], d += p[i + 3];
  }
  a += b + c + d;
  for (int i = 0; i < 8; i++) part->sum += a[i];
  return nullptr;
}

// Seconds to read `bytes` (a multiple of 256 per thread) with `threads` threads.
extern "C" double limits_read(const void* buffer, int64_t bytes, int threads) {
  Part parts[64];
  pthread_t ids[64];
  const int64_t each = bytes / threads / 256 * 256;
  const double begin = now();
  for (int i = 0; i < threads; i++) {
    parts[i] = {(const uint64_t*)((const char*)buffer + i * each), each / 8, 0};
    if (i) pthread_create(&ids[i], nullptr, read_part, &parts[i]);
  }
  read_part(&parts[0]);
  for (int i = 1; i < threads; i++) pthread_join(ids[i], nullptr);
  return now() - begin;
}

// GFLOP/s of one thread on registers alone: products of pairs of bfloat16; 0 where the CPU has no such instruction.
extern "C" double limits_peak() {
#if defined(__AVX512BF16__)
  enum { CHAINS = 24, TURNS = 400000 };
  __m512 sums[CHAINS];
  const __m512bh one = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int i = 0; i < CHAINS; i++) sums[i] = _mm512_setzero_ps();
  const double begin = now();
  for (int turn = 0; turn < TURNS; turn++) {
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; i++) sums[i] = _mm512_dpbf16_ps(sums[i], one, one);
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; i++) asm volatile("" ::"v"(sums[i]));
  }
  return 64. * CHAINS * TURNS / (now() - begin) / 1e9;
#else
  return 0;
#endif
}

#if defined(LIMITS_MAIN)
struct Core {
  int core;
  double gflops;
};
static void* peak_of(void* argument) {
  Core* on = (Core*)argument;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(on->core, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
  limits_peak();  // the clock settles
  on->gflops = limits_peak();
  return nullptr;
}

// gemm_limits CORE...: GFLOP/s of one thread on each of these cores, all at once, together.
int main(int count, char** arguments) {
  Core cores[64];
  pthread_t ids[64];
  double sum = 0;
  for (int i = 1; i < count && i < 64; i++) {
    cores[i].core = atoi(arguments[i]);
    pthread_create(&ids[i], nullptr, peak_of, &cores[i]);
  }
  for (int i = 1; i < count && i < 64; i++) pthread_join(ids[i], nullptr), sum += cores[i].gflops;
  printf("%.1f\n", sum);
}
#endif
