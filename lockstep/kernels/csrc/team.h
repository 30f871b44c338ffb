// The compute threads of one rank, and the waits that all of this library uses.
//
// A team runs one function on all its threads at once (thread 0 is the caller). Waits spin for a while, hand the core on and then sleep in
// the kernel: two threads on two cores meet in about 100 ns, eight ranks on two cores do not burn each other's time.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace lockstep {

double now_s();  // a monotonic clock
void relax();    // tells the CPU that this thread spins
// Runs Python's signal handlers where this thread came from Python's main thread; throws when one raises.
void check_signals();
// How long a wait spins before it hands the core on, and then sleeps (team.cpp, comm_shm.h). Where cores are shared
// with other ranks, 0 is right.
extern std::atomic<int64_t> spin_ns;

// Sleeps while *word == seen, at most timeout_s; false when that time ran out. `shared`: the word lives in memory of
// several processes.
bool futex_wait(std::atomic<uint32_t>* word, uint32_t seen, double timeout_s, bool shared);
void futex_wake_all(std::atomic<uint32_t>* word, bool shared);

struct Aborted : std::exception {  // another thread of the team failed; only that one's error is reported
  const char* what() const noexcept override { return "another thread of the team failed"; }
};

class Team;
struct Lane {  // one thread's place in its team
  Lane(int id, int size, Team* team) : id(id), size(size), team(team) {}
  int id, size;
  Team* team;
  void barrier();  // throws Aborted when a thread of the team failed
  // This thread's run of n items cut evenly: [first, last)
  int64_t first(int64_t n) const { return n * id / size; }
  int64_t last(int64_t n) const { return n * (id + 1) / size; }
  // The same, for items whose time varies: after begin(n) every take() gives one more item, -1 at the end. A thread goes
  // through its own run in order and then helps the others from the ends of theirs. Between two such loops there must be a
  // barrier.
  void begin(int64_t n);
  int64_t take();

 private:
  int64_t next_ = 0, end_ = 0;  // of a thread that is alone
};

class Team {
 public:
  Team() = default;  // of one thread: the caller
  Team(const Team&) = delete;
  ~Team() { stop(); }
  // Replaces the threads. cores: where to bind each ([0] is not bound: it is the caller's); empty binds nobody. Waits for
  // a job that runs. Throws std::invalid_argument, and std::runtime_error where the system gives no thread (the team is
  // one of one thread then).
  void reshape(int64_t threads, const std::vector<int>& cores);
  int size() const { return size_.load(std::memory_order_relaxed); }
  // Runs f on every thread; throws the first error that a thread threw. Callers take turns. A job may not start another.
  void run(const std::function<void(Lane&)>& f);

 private:
  friend struct Lane;
  void stop();
  void work(int id, int core);
  void lane(int id);
  void barrier();
  std::mutex busy_;  // held while a job runs
  std::atomic<int> size_{1};
  const std::function<void(Lane&)>* job_ = nullptr;
  std::vector<std::thread> threads_;
  struct alignas(64) Run { std::atomic<uint64_t> left{0}; };  // [low half, high half)
  std::unique_ptr<Run[]> runs_{new Run[1]};                   // by thread: what is left of its run
  alignas(64) std::atomic<uint32_t> turn_{0};  // counts jobs
  alignas(64) std::atomic<uint32_t> done_{0};  // threads that finished this one, the caller not counted
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<uint32_t> sleepers_{0}, idle_{0}, waiting_{0};  // who sleeps: at a barrier, without a job, for the end
  std::atomic<bool> failed_{false}, stop_{false};
  std::exception_ptr error_;
  std::mutex error_lock_;
};

// This process's team, for as long as it lives: of one thread until it is reshaped, and of one again in a forked child,
// which has none of its parent's threads.
Team& team();
// Sleeps within teams that ended by their time running out though what they waited for had happened: 0, or a bug.
int64_t missed_wakes();

}  // namespace lockstep
