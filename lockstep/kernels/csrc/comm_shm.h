// The shared-memory segment of a group on one host.
//
//   controls   one per rank: how far it is, what it is in, who sleeps on it, which process it is
//   slots      [rank][parity][slot_bytes]
//
// The segment is a memfd: it has no name, nobody else can open it, and the kernel frees it with its last user.
#pragma once
#include <atomic>
#include <string>
#include <vector>

#include "comm.h"

namespace lockstep {

struct alignas(128) Control {
  std::atomic<uint32_t> epoch;     // syncs that this rank has begun; others wait, and may sleep, on it
  std::atomic<uint32_t> sleepers;  // who sleeps on `epoch`
  uint64_t tags[2];                // of its last two syncs, by parity
  alignas(64) int64_t pid;
  int64_t started;  // the process's start time: a number that came back is another process
};

class ShmGroup : public Group {
 public:
  // fd: a segment of segment_bytes(...), which this takes over. timeout_s: longest wait for another rank.
  ShmGroup(int fd, int rank, int world, size_t slot_bytes, double timeout_s);
  ~ShmGroup() override;
  static size_t segment_bytes(int world, size_t slot_bytes);
  char* slot(int r) override { return slot_of(r, (epoch_ + 1) & 1); }
  char* slot_after(int r) override { return slot_of(r, epoch_ & 1); }
  void sync(uint64_t tag) override;

 private:
  char* slot_of(int r, uint32_t parity) { return slots_ + (size_t(r) * 2 + parity) * slot_bytes; }
  void wait_for(int r, uint32_t epoch, uint64_t tag);
  [[noreturn]] void fail(const std::string& why);
  char* memory_;
  size_t bytes_;
  Control* controls_;
  char* slots_;
  uint32_t epoch_ = 0;
  double timeout_s_;
  std::string failure_;
};

}  // namespace lockstep
