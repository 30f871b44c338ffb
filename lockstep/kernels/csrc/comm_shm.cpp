#include "comm_shm.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "team.h"
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace lockstep {

namespace {

// (state, start time) from /proc/<pid>/stat; state 0 when there is no such process.
std::pair<char, int64_t> process_state(int64_t pid) {
  char path[64], text[512] = {};
  snprintf(path, sizeof path, "/proc/%lld/stat", static_cast<long long>(pid));
  FILE* file = fopen(path, "r");
  if (!file) return {0, 0};
  const size_t n = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  text[n] = 0;
  const char* after = strrchr(text, ')');  // the name may hold anything
  if (!after) return {0, 0};
  char state = 0;
  long long started = 0;
  sscanf(after + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %lld", &state, &started);
  return {state, started};
}

std::string describe(uint64_t tag) {
  char text[64];
  snprintf(text, sizeof text, "operation %llu of size %llu", static_cast<unsigned long long>(tag >> 32), static_cast<unsigned long long>(tag & 0xffffffffu));
  return text;
}

constexpr double LOOK_S = 0.05;  // how often a sleeping rank looks whether the others live

}  // namespace

size_t ShmGroup::segment_bytes(int world, size_t slot_bytes) {
  return (sizeof(Control) * size_t(world) + 4095) / 4096 * 4096 + size_t(world) * 2 * slot_bytes;
}

ShmGroup::ShmGroup(int fd, int r, int w, size_t bytes, double timeout_s) : timeout_s_(timeout_s) {
  rank = r, world = w, slot_bytes = bytes;
  bytes_ = segment_bytes(w, bytes);
  void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  const int error = errno;
  close(fd);
  if (p == MAP_FAILED) throw std::runtime_error(std::string("mapping the shared memory of a group failed: ") + strerror(error));
#if defined(MADV_HUGEPAGE)
  madvise(p, bytes_, MADV_HUGEPAGE);
#endif
  memory_ = static_cast<char*>(p);
  controls_ = reinterpret_cast<Control*>(memory_);
  slots_ = memory_ + (sizeof(Control) * size_t(w) + 4095) / 4096 * 4096;
  controls_[rank].pid = getpid();
  controls_[rank].started = process_state(getpid()).second;
}

ShmGroup::~ShmGroup() { munmap(memory_, bytes_); }

void ShmGroup::sync(uint64_t tag) {
  if (!failure_.empty()) throw std::runtime_error(failure_);
  const uint32_t epoch = epoch_ + 1;
  Control& mine = controls_[rank];
  mine.tags[epoch & 1] = tag;
  mine.epoch.store(epoch);  // sequentially consistent: either a sleeper is seen below, or it sees the new epoch
  if (mine.sleepers.load()) futex_wake_all(&mine.epoch, true);
  for (int r = 0; r < world; r++)
    if (r != rank) wait_for(r, epoch, tag);
  epoch_ = epoch;
}

void ShmGroup::wait_for(int r, uint32_t epoch, uint64_t tag) {
  Control& theirs = controls_[r];
  auto there = [&] { return int32_t(theirs.epoch.load(std::memory_order_acquire) - epoch) >= 0; };
  for (int i = 0; i < 200 && !there(); i++) relax();
  if (!there()) {
    const double begin = now_s(), spin_s = 1e-9 * double(spin_ns.load(std::memory_order_relaxed));
    while (!there() && now_s() - begin < spin_s)
      for (int i = 0; i < 64 && !there(); i++) relax();
    theirs.sleepers.fetch_add(1);
    while (true) {
      const uint32_t seen = theirs.epoch.load();
      if (int32_t(seen - epoch) >= 0) break;
      futex_wait(&theirs.epoch, seen, LOOK_S, true);
      if (there()) break;
      const double waited = now_s() - begin;
      if (waited < LOOK_S / 2) continue;
      const auto [state, started] = process_state(theirs.pid);
      char text[256];
      if (!state || state == 'Z' || state == 'X' || started != theirs.started)
        snprintf(text, sizeof text, "rank %d of the group (pid %lld) died while rank %d waited for it in %s", r, static_cast<long long>(theirs.pid), rank, describe(tag).c_str());
      else if (waited > timeout_s_)
        snprintf(text, sizeof text, "rank %d of the group (pid %lld) did not come within %.1f s to %s, where rank %d waits", r, static_cast<long long>(theirs.pid), timeout_s_, describe(tag).c_str(), rank);
      else
        continue;
      theirs.sleepers.fetch_sub(1);
      fail(text);
    }
    theirs.sleepers.fetch_sub(1);
  }
  if (theirs.tags[epoch & 1] != tag)
    fail("ranks " + std::to_string(rank) + " and " + std::to_string(r) + " of the group met in different collectives: " + describe(tag) + " and " + describe(theirs.tags[epoch & 1]));
}

void ShmGroup::fail(const std::string& why) {
  failure_ = why;
  throw std::runtime_error(why);
}

}  // namespace lockstep
