#include "comm_shm.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace lockstep {

constexpr double SLICE_S = 0.05;  // longest sleep between two looks at whether the others live
constexpr size_t ALIGN = size_t(2) << 20;

static size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Where each part begins; the last is the end.
struct Layout {
  size_t lines, rings, ring_data, slots, end;
  Layout(size_t world, size_t slot_bytes, size_t ring_bytes) {
    lines = up(sizeof(Header), 64);
    rings = up(lines + world * sizeof(Line), 64);
    ring_data = up(rings + world * world * sizeof(Ring), 4096);
    slots = up(ring_data + world * world * ring_bytes, ALIGN);
    end = slots + 2 * world * slot_bytes;
  }
};

size_t ShmGroup::bytes(int world, size_t slot_bytes, size_t ring_bytes) { return Layout(size_t(world), slot_bytes, ring_bytes).end; }

ShmGroup::ShmGroup(int fd, int rank_, int world_, size_t slot_bytes_, size_t ring_bytes, double timeout_s, bool may_spin, const char* name,
                   const int64_t* ranks)
    : name_(name), ranks_(ranks, ranks + world_), timeout_s_(timeout_s), may_spin_(may_spin), ring_bytes_(ring_bytes), sends_(size_t(world_)), receives_(size_t(world_)) {
  if (world_ < 1 || world_ > MAX_WORLD || rank_ < 0 || rank_ >= world_) throw std::invalid_argument("rank or world size out of range");
  if (ring_bytes & (ring_bytes - 1)) throw std::invalid_argument("ring_bytes must be a power of two");
  rank = rank_, world = world_, slot_bytes = slot_bytes_;
  Layout at(size_t(world), slot_bytes, ring_bytes);
  struct stat info;
  if (fstat(fd, &info) || size_t(info.st_size) != at.end) throw std::runtime_error("the shared segment has another size than this rank expects");
  void* p = mmap(nullptr, at.end, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (p == MAP_FAILED) throw std::runtime_error(std::string("mmap of the shared segment: ") + strerror(errno));
  base_ = static_cast<char*>(p);
  mapped_ = at.end;
#if defined(MADV_HUGEPAGE)
  madvise(base_ + at.slots, at.end - at.slots, MADV_HUGEPAGE);  // refused: small pages serve too
#endif
  header_ = reinterpret_cast<Header*>(base_);
  crowded = !may_spin, halves = header_->halves;
  lines_ = reinterpret_cast<Line*>(base_ + at.lines);
  rings_ = reinterpret_cast<Ring*>(base_ + at.rings);
  ring_data_ = base_ + at.ring_data;
  slots_ = base_ + at.slots;
  lines_[rank].pid = getpid();
  lines_[rank].birth = process_birth(getpid());
  lines_[rank].presence.store(uint32_t(Presence::Here));
}

ShmGroup::~ShmGroup() {
  {
    std::lock_guard<std::mutex> hold(moving_);
    stop_ = true;
  }
  posted_.notify_one();
  if (helper_.joinable()) helper_.join();
  uint32_t here = uint32_t(Presence::Here);
  lines_[rank].presence.compare_exchange_strong(here, uint32_t(Presence::Left));
  header_->bell.fetch_add(1);
  futex_wake_all(&header_->bell, true);
  munmap(base_, mapped_);
}

std::string ShmGroup::who(int r) const { return "rank " + number(r) + " of group " + name_ + " (pid " + std::to_string(lines_[r].pid) + ")"; }

void ShmGroup::check() const {
  if (!failed_.empty()) throw std::runtime_error(failed_);
}

void ShmGroup::tell_failed(const std::string& text) {
  Line& mine = lines_[rank];
  failed_ = text;
  strncpy(mine.reason, text.c_str(), sizeof mine.reason - 1);
  mine.presence.store(uint32_t(Presence::Failed));
  header_->bell.fetch_add(1);  // whoever waits for this rank looks at once
  futex_wake_all(&header_->bell, true);
}

void ShmGroup::fail(const std::string& text) {
  tell_failed(text);
  throw std::runtime_error(text);
}

// Runs Python's signal handlers. One that raises (Ctrl-C) has left the others alone in this operation.
void ShmGroup::heed_signals() {
  try {
    check_signals();
  } catch (...) {
    tell_failed("rank " + number(rank) + " of group " + name_ + " (pid " + std::to_string(getpid()) + ") was interrupted by a signal.");
    throw;
  }
}

void ShmGroup::look_at(int peer, const std::string& what, double since, const std::function<bool()>& done) {
  const Line& line = lines_[peer];
  auto presence = Presence(line.presence.load());
  double waited = now_s() - since;
  std::string why;
  if (presence == Presence::Left) why = " has left the group";
  else if (presence == Presence::Failed) why = std::string(" has failed: ") + line.reason;
  else if (!process_alive(line.pid, line.birth)) why = " is dead";
  else if (waited > timeout_s_) why = " has not come in " + seconds_text(timeout_s_) + ", the group's timeout; it last entered " +
                                      (line.arrived.load() ? tag_text(line.tag[line.arrived.load() & 1].load()) : std::string("nothing"));
  // What it did before it went counts.
  if (why.empty() || done()) return;
  fail(what + ": " + who(peer) + why + ". Rank " + number(rank) + " (pid " + std::to_string(getpid()) + ") waited for " + seconds_text(waited) + ".");
}

bool ShmGroup::all_arrived(uint32_t epoch) const {
  for (int r = 0; r < world; r++)
    if (int32_t(lines_[r].arrived.load() - epoch) < 0) return false;
  return true;
}

namespace {
struct Counted {  // holds a count of sleepers up by one
  std::atomic<uint32_t>& n;
  explicit Counted(std::atomic<uint32_t>& n) : n(n) { n.fetch_add(1); }
  ~Counted() { n.fetch_sub(1); }
};
}  // namespace

void ShmGroup::wait_for(int r, uint32_t epoch, uint64_t tag) {
  auto here = [&] { return int32_t(lines_[r].arrived.load(std::memory_order_acquire) - epoch) >= 0; };
  if (stay_awake(here)) return;
  double since = now_s(), looked = since;
  Counted sleeper(header_->sleepers);
  for (;;) {
    // In this order: who arrives after the bell was read rings it, since it sees a sleeper.
    uint32_t bell = header_->bell.load();
    if (all_arrived(epoch)) return;
    auto presence = Presence(lines_[r].presence.load());
    double now = now_s();
    if (now - looked >= SLICE_S || presence != Presence::Here) {
      looked = now;
      heed_signals();
      for (int p = 0; p < world; p++)
        if (int32_t(lines_[p].arrived.load() - epoch) < 0) look_at(p, tag_text(tag), since, [&] { return int32_t(lines_[p].arrived.load() - epoch) >= 0; });
    }
    futex_wait(&header_->bell, bell, SLICE_S, true);
  }
}

void ShmGroup::check_tags(uint32_t epoch, uint64_t tag) {
  for (int r = 0; r < world; r++) {
    uint64_t theirs = lines_[r].tag[epoch & 1].load(std::memory_order_relaxed);
    if (theirs != tag)
      fail("ranks of group " + name_ + " differ: rank " + number(rank) + " (pid " + std::to_string(getpid()) + ") entered " + tag_text(tag) + ", " + who(r) + " entered " +
           tag_text(theirs) + ".");
  }
}

void ShmGroup::arrive(uint64_t tag) {
  if (!failed_.empty()) check();
  Line& mine = lines_[rank];
  const uint32_t epoch = epoch_ + 1;
  mine.tag[epoch & 1].store(tag, std::memory_order_relaxed);
  mine.arrived.store(epoch);  // sequentially consistent: seen before the sleepers are looked at
  if (header_->sleepers.load() && all_arrived(epoch)) {
    header_->bell.fetch_add(1);
    futex_wake_all(&header_->bell, true);
  }
}

void ShmGroup::await() {
  const uint32_t epoch = epoch_ + 1;
  const uint64_t tag = lines_[rank].tag[epoch & 1].load(std::memory_order_relaxed);
  double since = 0;
  for (int r = 0; r < world; r++)
    if (int32_t(lines_[r].arrived.load(std::memory_order_acquire) - epoch) < 0) {
      if (since == 0) since = now_s();
      wait_for(r, epoch, tag);
    }
  if (since != 0) waited_s_ += now_s() - since;
  check_tags(epoch, tag);
  epoch_ = epoch;
}

}  // namespace lockstep
