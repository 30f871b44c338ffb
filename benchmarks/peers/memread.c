// The memory's read bandwidth: threads that each sum an array of their own, far larger than the caches.
// memread THREADS MIB REPEATS HUGE(0|1) CORE... prints one JSON line. Build: cc -O3 -march=native -pthread memread.c
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { MAX_THREADS = 256, LANES = 8 };
typedef float wide __attribute__((vector_size(64)));

static size_t bytes_each;
static int threads, repeats, huge, cores[MAX_THREADS];
static double times[1024];
static float sums[MAX_THREADS];
static pthread_barrier_t together;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Several sums at once: one alone would wait for its own last addition.
static float sum(const wide* from, size_t count) {
  wide total[LANES];
  memset(total, 0, sizeof total);
  for (size_t i = 0; i + LANES <= count; i += LANES)
    for (int lane = 0; lane < LANES; lane++) total[lane] += from[i + lane];
  float result = 0;
  for (int lane = 0; lane < LANES; lane++)
    for (int k = 0; k < 16; k++) result += total[lane][k];
  return result;
}

static void* reader(void* argument) {
  int id = (int)(intptr_t)argument;
  cpu_set_t own;
  CPU_ZERO(&own);
  CPU_SET(cores[id], &own);
  sched_setaffinity(0, sizeof own, &own);
  char* memory = mmap(NULL, bytes_each, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) exit(3);
  madvise(memory, bytes_each, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  memset(memory, 0, bytes_each);
  for (int i = 0; i <= repeats; i++) {  // the first pass warms up and is not counted
    pthread_barrier_wait(&together);
    double start = now();
    sums[id] += sum((const wide*)memory, bytes_each / sizeof(wide));
    pthread_barrier_wait(&together);
    if (id == 0) times[i] = now() - start;
  }
  return NULL;
}

static int ascending(const void* a, const void* b) { return (*(double*)a > *(double*)b) - (*(double*)a < *(double*)b); }

// How much of this process the system backs with huge pages, in MiB: asking is not getting.
static long huge_mib(void) {
  char line[256];
  long kib = 0, value;
  FILE* rollup = fopen("/proc/self/smaps_rollup", "r");
  while (rollup && fgets(line, sizeof line, rollup))
    if (sscanf(line, "AnonHugePages: %ld", &value) == 1) kib = value;
  if (rollup) fclose(rollup);
  return kib / 1024;
}

int main(int count, char** given) {
  if (count < 6) return 2;
  threads = atoi(given[1]), repeats = atoi(given[3]), huge = atoi(given[4]);
  if (threads < 1 || threads > MAX_THREADS || repeats < 1 || repeats > 1000) return 2;
  bytes_each = ((size_t)atol(given[2]) << 20) / (size_t)threads / 4096 * 4096;
  for (int i = 0; i < threads; i++) cores[i] = atoi(given[5 + i % (count - 5)]);
  pthread_barrier_init(&together, NULL, (unsigned)threads);
  pthread_t others[MAX_THREADS];
  for (int i = 1; i < threads; i++) pthread_create(&others[i], NULL, reader, (void*)(intptr_t)i);
  reader((void*)0);
  long granted = huge_mib();
  for (int i = 1; i < threads; i++) pthread_join(others[i], NULL);
  qsort(times + 1, (size_t)repeats, sizeof *times, ascending);
  double gigabytes = (double)bytes_each * threads / 1e9, sink = 0;
  for (int i = 0; i < threads; i++) sink += sums[i];
  printf("{\"median_GBps\": %.2f, \"best_GBps\": %.2f, \"huge_mib\": %ld, \"sum\": %g}\n", gigabytes / times[1 + repeats / 2],
         gigabytes / times[1], granted, sink);
  return 0;
}
