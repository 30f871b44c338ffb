// What two processes that share memory need at least for an in-place all-reduce of bfloat16: no checks, no sleep, no names.
// allreduce_bound BYTES CALLS CORE CORE prints {"oneshot_s", "twoshot_s"}, seconds of all calls. cc -O3 -march=native -pthread
//
// One shot: both publish everything and each adds all of it. Two shots: each publishes the half that the other adds, then the
// sums change hands. Two buffers in turn: a rank may fill the next one while the other still reads this one, never the one after.
#define _GNU_SOURCE
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

enum { CHUNK = 512 << 10 };  // both ranks' chunks stay in the caches
typedef uint16_t bf16;
typedef struct {
  _Alignas(64) _Atomic uint64_t published;
  _Alignas(64) _Atomic uint64_t summed;
  _Alignas(4096) bf16 data[2][CHUNK / 2];
  bf16 sums[2][CHUNK / 4];
} Side;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void wait_for(_Atomic uint64_t* flag, uint64_t turn) {
  while (atomic_load_explicit(flag, memory_order_acquire) < turn) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

// to = a + b in float32, rounded to nearest even.
static void add(bf16* to, const bf16* a, const bf16* b, size_t count) {
  size_t i = 0;
#ifdef __AVX512BF16__
  for (; i + 16 <= count; i += 16) {
    __m512i x = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(a + i))), 16);
    __m512i y = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(b + i))), 16);
    __m256bh sum = _mm512_cvtneps_pbh(_mm512_add_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y)));
    memcpy(to + i, &sum, sizeof sum);
  }
#endif
  for (; i < count; i++) {
    union { uint32_t bits; float value; } x = {(uint32_t)a[i] << 16}, y = {(uint32_t)b[i] << 16};
    x.value += y.value;
    to[i] = (bf16)((x.bits + 0x7fff + (x.bits >> 16 & 1)) >> 16);
  }
}

static void one_shot(Side* mine, Side* theirs, bf16* x, size_t count, uint64_t* turn) {
  for (size_t at = 0; at < count; at += CHUNK / 2) {
    size_t n = count - at < CHUNK / 2 ? count - at : CHUNK / 2;
    uint64_t t = ++*turn;
    memcpy(mine->data[t & 1], x + at, n * 2);
    atomic_store_explicit(&mine->published, t, memory_order_release);
    wait_for(&theirs->published, t);
    add(x + at, x + at, theirs->data[t & 1], n);
  }
}

static void two_shot(Side* mine, Side* theirs, int rank, bf16* x, size_t count, uint64_t* turn) {
  for (size_t at = 0; at < count; at += CHUNK / 2) {
    size_t n = count - at < CHUNK / 2 ? count - at : CHUNK / 2, half = n / 2;
    uint64_t t = ++*turn;
    size_t own = at + (rank ? half : 0), other = at + (rank ? 0 : half), owned = rank ? n - half : half;
    memcpy(mine->data[t & 1], x + other, (n - owned) * 2);
    atomic_store_explicit(&mine->published, t, memory_order_release);
    wait_for(&theirs->published, t);
    add(mine->sums[t & 1], x + own, theirs->data[t & 1], owned);
    atomic_store_explicit(&mine->summed, t, memory_order_release);
    memcpy(x + own, mine->sums[t & 1], owned * 2);
    wait_for(&theirs->summed, t);
    memcpy(x + other, theirs->sums[t & 1], (n - owned) * 2);
  }
}

int main(int count, char** given) {
  if (count != 5) return 2;
  size_t values = (size_t)atol(given[1]) / 2;
  long calls = atol(given[2]);
  Side* sides = mmap(NULL, 2 * sizeof(Side), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (sides == MAP_FAILED || values < 2 || calls < 1) return 3;
  memset(sides, 0, 2 * sizeof(Side));
  int rank = fork() == 0;
  cpu_set_t own;
  CPU_ZERO(&own);
  CPU_SET(atoi(given[3 + rank]), &own);
  sched_setaffinity(0, sizeof own, &own);
  bf16* x = aligned_alloc(4096, (values * 2 + 4095) / 4096 * 4096);
  memset(x, 0, values * 2);
  Side *mine = &sides[rank], *theirs = &sides[!rank];
  uint64_t turn = 0;
  double seconds[2];
  for (int kind = 0; kind < 2; kind++) {  // 1 + 2 is 3, or this is a bound of nothing
    for (size_t i = 0; i < values; i++) x[i] = rank ? 0x4000 : 0x3f80;
    kind ? two_shot(mine, theirs, rank, x, values, &turn) : one_shot(mine, theirs, x, values, &turn);
    for (size_t i = 0; i < values; i++)
      if (x[i] != 0x4040) abort();
  }
  memset(x, 0, values * 2);
  for (int kind = 0; kind < 2; kind++)
    for (int timed = 0; timed < 2; timed++) {
      double start = now();
      for (long i = 0; i < (timed ? calls : 3); i++)
        kind ? two_shot(mine, theirs, rank, x, values, &turn) : one_shot(mine, theirs, x, values, &turn);
      seconds[kind] = now() - start;
    }
  if (rank) return 0;
  printf("{\"oneshot_s\": %.9g, \"twoshot_s\": %.9g}\n", seconds[0], seconds[1]);
  wait(NULL);
  return 0;
}
