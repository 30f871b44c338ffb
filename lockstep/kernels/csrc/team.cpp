#include "team.h"

#include <cerrno>
#include <ctime>
#include <memory>
#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lockstep {

std::atomic<int64_t> spin_ns{50'000};
// Between two jobs Python plans a step: waiting for that awake, spin_ns times this, is cheaper than being woken.
constexpr int64_t JOB_PATIENCE = 6;

double now_s() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

#if defined(__linux__)
void futex_wait(std::atomic<uint32_t>* word, uint32_t seen, double timeout_s, bool shared) {
  timespec t;
  t.tv_sec = time_t(timeout_s);
  t.tv_nsec = long((timeout_s - double(t.tv_sec)) * 1e9);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), shared ? FUTEX_WAIT : FUTEX_WAIT_PRIVATE, seen, &t, nullptr, 0);
}
void futex_wake_all(std::atomic<uint32_t>* word, bool shared) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), shared ? FUTEX_WAKE : FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}
static void bind(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // not allowed: unbound is slower, not wrong
}
#else
void futex_wait(std::atomic<uint32_t>*, uint32_t, double, bool) {
  timespec t{0, 100'000};
  nanosleep(&t, nullptr);
}
void futex_wake_all(std::atomic<uint32_t>*, bool) {}
static void bind(int) {}
#endif

// Returns when *word != seen: spins, then sleeps. `sleepers` tells wakers that somebody sleeps.
static void wait_change(std::atomic<uint32_t>& word, uint32_t seen, std::atomic<uint32_t>& sleepers, int64_t patience = 1) {
  if (int64_t budget = patience * spin_ns.load(std::memory_order_relaxed)) {
    double until = now_s() + 1e-9 * double(budget);
    do {
      for (int i = 0; i < 64; i++) {
        if (word.load(std::memory_order_acquire) != seen) return;
        relax();
      }
    } while (now_s() < until);
  }
  sleepers.fetch_add(1);
  while (word.load() == seen) futex_wait(&word, seen, 1.0, false);
  sleepers.fetch_sub(1);
}

void Lane::barrier() {
  if (size > 1) team->barrier();
}

Team::Team(int threads, const std::vector<int>& cores) : size_(threads) {
  for (int id = 1; id < size_; id++) {
    int core = size_t(id) < cores.size() ? cores[size_t(id)] : -1;
    threads_.emplace_back([this, id, core] { work(id, core); });
  }
}

Team::~Team() {
  stop_ = true;
  turn_.fetch_add(1);
  futex_wake_all(&turn_, false);
  for (auto& t : threads_) t.join();
}

void Team::barrier() {
  // In this order: who reads the generation that a failure began also sees the failure.
  uint32_t generation = generation_.load(std::memory_order_acquire);
  if (failed_.load(std::memory_order_relaxed)) throw Aborted();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(size_)) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1);
    if (sleepers_.load()) futex_wake_all(&generation_, false);
  } else {
    wait_change(generation_, generation, sleepers_);
  }
  if (failed_.load(std::memory_order_relaxed)) throw Aborted();
}

void Team::lane(int id) {
  Lane lane{id, size_, this};
  try {
    (*job_)(lane);
  } catch (const Aborted&) {
  } catch (...) {
    std::lock_guard<std::mutex> hold(error_lock_);
    if (!error_) error_ = std::current_exception();
    failed_ = true;
  }
  if (size_ == 1) return;
  if (failed_) {  // release those that wait in a barrier: they leave through `failed_`
    generation_.fetch_add(1);
    futex_wake_all(&generation_, false);
  }
}

void Team::work(int id, int core) {
  if (core >= 0) bind(core);
  uint32_t seen = 0;
  for (;;) {
    wait_change(turn_, seen, idle_, JOB_PATIENCE);
    seen = turn_.load(std::memory_order_acquire);
    if (stop_) return;
    lane(id);
    done_.fetch_add(1);
    if (size_t(done_.load()) == threads_.size()) futex_wake_all(&done_, false);
  }
}

// Two engines of one process may be used from two threads: their jobs take turns, and nobody reshapes a team at work.
static std::mutex busy;

void Team::run(const std::function<void(Lane&)>& f) {
  std::lock_guard<std::mutex> hold(busy);
  job_ = &f;
  failed_ = false;
  error_ = nullptr;
  arrived_ = 0;
  done_ = 0;
  if (size_ > 1) {
    turn_.fetch_add(1);
    if (idle_.load()) futex_wake_all(&turn_, false);
  }
  lane(0);
  for (uint32_t n; (n = done_.load(std::memory_order_acquire)) < threads_.size();) wait_change(done_, n, waiting_);
  if (error_) std::rethrow_exception(error_);
}

static std::unique_ptr<Team> the_team;

Team& team() {
  if (!the_team) the_team = std::make_unique<Team>(1, std::vector<int>{});
  return *the_team;
}

void set_team(int64_t threads, const int* cores, int64_t n_cores) {
  std::lock_guard<std::mutex> hold(busy);
  the_team.reset();
  the_team = std::make_unique<Team>(int(threads), std::vector<int>(cores, cores + n_cores));
}

}  // namespace lockstep
