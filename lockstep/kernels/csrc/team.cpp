#include "team.h"

#include <sched.h>

#include <cerrno>
#include <ctime>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lockstep {

std::atomic<int64_t> spin_ns{50'000};
// Between two jobs Python plans a step: waiting for that awake, spin_ns times this, is cheaper than being woken.
constexpr int64_t JOB_PATIENCE = 6;
// After that a thread with a core of its own hands it on, to whoever has work there, before it sleeps: see YIELD_S in comm_shm.h.
constexpr double AWAKE_S = 1e-3;

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
bool futex_wait(std::atomic<uint32_t>* word, uint32_t seen, double timeout_s, bool shared) {
  timespec t;
  t.tv_sec = time_t(timeout_s);
  t.tv_nsec = long((timeout_s - double(t.tv_sec)) * 1e9);
  const long rc = syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), shared ? FUTEX_WAIT : FUTEX_WAIT_PRIVATE, seen, &t, nullptr, 0);
  return rc == 0 || errno != ETIMEDOUT;
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
bool futex_wait(std::atomic<uint32_t>*, uint32_t, double, bool) {
  timespec t{0, 100'000};
  nanosleep(&t, nullptr);
  return true;
}
void futex_wake_all(std::atomic<uint32_t>*, bool) {}
static void bind(int) {}
#endif

static std::atomic<int64_t> missed{0};
int64_t missed_wakes() { return missed.load(); }

// Returns when *word != seen: spins, hands the core on for a while, then sleeps. `sleepers` tells wakers that somebody sleeps.
static void wait_change(std::atomic<uint32_t>& word, uint32_t seen, std::atomic<uint32_t>& sleepers, int64_t patience = 1) {
  if (int64_t budget = patience * spin_ns.load(std::memory_order_relaxed)) {
    double until = now_s() + 1e-9 * double(budget);
    do {
      for (int i = 0; i < 64; i++) {
        if (word.load(std::memory_order_acquire) != seen) return;
        relax();
      }
    } while (now_s() < until);
    for (until += AWAKE_S; now_s() < until;) {
      sched_yield();
      if (word.load(std::memory_order_acquire) != seen) return;
    }
  }
  sleepers.fetch_add(1);
  while (word.load() == seen)
    if (!futex_wait(&word, seen, 1.0, false) && word.load() != seen) missed++;
  sleepers.fetch_sub(1);
}

void Lane::barrier() {
  if (size > 1) team->barrier();
}

void Lane::begin(int64_t n) {
  if (size == 1) next_ = 0, end_ = n;
  else team->runs_[size_t(id)].left.store(uint64_t(last(n)) << 32 | uint64_t(first(n)));
}

int64_t Lane::take() {
  if (size == 1) return next_ < end_ ? next_++ : -1;
  for (int i = 0; i < size; i++) {
    std::atomic<uint64_t>& left = team->runs_[size_t((id + i) % size)].left;
    for (uint64_t seen = left.load();;) {
      const uint64_t next = seen & 0xffffffff, end = seen >> 32;
      if (next >= end) break;
      if (i == 0 && left.compare_exchange_weak(seen, end << 32 | (next + 1))) return int64_t(next);
      if (i != 0 && left.compare_exchange_weak(seen, (end - 1) << 32 | next)) return int64_t(end - 1);
    }
  }
  return -1;
}

// Whether this thread is within a job.
static thread_local bool in_job = false;

static void refuse_in_job() {
  if (in_job) throw std::logic_error("a job of the team may neither start another one nor reshape the team");
}

void Team::reshape(int64_t threads, const std::vector<int>& cores) {
  if (threads < 1 || threads > 4096) throw std::invalid_argument("a team has 1 to 4096 threads, not " + std::to_string(threads));
  refuse_in_job();
  std::lock_guard<std::mutex> hold(busy_);
  stop();
  size_ = int(threads);
  runs_.reset(new Run[size_t(threads)]);
  try {
    for (int id = 1; id < size_; id++) {
      const int core = size_t(id) < cores.size() ? cores[size_t(id)] : -1;
      threads_.emplace_back([this, id, core] { work(id, core); });
    }
  } catch (const std::system_error& error) {
    stop();
    throw std::runtime_error("could not start " + std::to_string(threads) + " threads: " + error.what());
  }
}

// Ends the threads: a team of one is left. None of them is within a job.
void Team::stop() {
  stop_ = true;
  turn_.fetch_add(1);
  futex_wake_all(&turn_, false);
  for (auto& t : threads_) t.join();
  threads_.clear();
  size_ = 1;
  stop_ = false;
  turn_ = 0;
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
  in_job = true;
  try {
    (*job_)(lane);
  } catch (const Aborted&) {
  } catch (...) {
    std::lock_guard<std::mutex> hold(error_lock_);
    if (!error_) error_ = std::current_exception();
    failed_ = true;
  }
  in_job = false;
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
    if (done_.fetch_add(1) + 1 == uint32_t(size_) - 1 && waiting_.load()) futex_wake_all(&done_, false);
  }
}

void Team::run(const std::function<void(Lane&)>& f) {
  refuse_in_job();
  std::lock_guard<std::mutex> hold(busy_);
  job_ = &f;
  failed_ = false;
  error_ = nullptr;
  arrived_ = 0;
  done_ = 0;
  for (int i = 0; i < size_; i++) runs_[size_t(i)].left = 0;  // a job that failed leaves something
  const uint32_t others = uint32_t(size_) - 1;
  if (others) {
    turn_.fetch_add(1);
    if (idle_.load()) futex_wake_all(&turn_, false);
  }
  lane(0);
  for (uint32_t n; (n = done_.load(std::memory_order_acquire)) < others;) wait_change(done_, n, waiting_);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

// Never freed: threads may still be within it when the process ends, and an exit must not wait for them.
static std::atomic<Team*> the_team{nullptr};

static Team* first_team() {
#if defined(__linux__)
  pthread_atfork(nullptr, nullptr, [] { the_team = new Team(); });  // the old one's threads and locks are the parent's
#endif
  the_team = new Team();
  return the_team;
}

Team& team() {
  static Team* const first = first_team();
  (void)first;
  return *the_team;
}

}  // namespace lockstep
