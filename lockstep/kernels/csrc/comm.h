// Shared memory of the ranks of one group on one host, and how they wait for each other.
//
// Each rank owns a slot of `slot_bytes`, twice: collectives alternate between the two halves (the epoch's parity). In an
// epoch a rank writes its own slot, calls sync, and may then read everybody's. No second meeting is needed before the
// slot is written again: that happens two epochs later, when everybody has passed the sync between.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace lockstep {

// What ranks do when they meet. Names for messages are in comm_errors.cpp. An operation of a program gives its own number
// in place of the dtype and the byte before it, and any detail below.
enum class Call : uint8_t { Step, Barrier, AllReduce, AllGather, ReduceScatter, Gather, Broadcast, AllToAll, Combine, Send, Largest };

// A tag for sync: ranks that do the same have the same one. dtype: a number of SUMMED in shm.py (255: bytes of any kind).
// detail: what else they must agree on, 0 to 255: a rank + 1, or shares_of.
constexpr uint64_t make_tag(Call call, int dtype, uint64_t bytes, uint64_t detail = 0) {
  return uint64_t(call) << 56 | uint64_t(dtype & 255) << 48 | (detail & 255) << 40 | (bytes & 0xffffffffff);
}

// A mark of ranks' shares that two different lists hardly have in common; 0 for equal shares.
inline uint64_t shares_of(const int64_t* shares, int world) {
  bool equal = true;
  uint64_t mark = 14695981039346656037u;  // FNV-1a
  for (int r = 0; r < world; r++) equal &= shares[r] == shares[0], mark = (mark ^ uint64_t(shares[r])) * 1099511628211u;
  return equal ? 0 : 1 + (mark ^ mark >> 32) % 255;
}

constexpr int MAX_NODES = 256;  // of the tree by which a group's partial sums are added

class Group {
 public:
  virtual ~Group() = default;
  int rank = 0, world = 1;
  size_t slot_bytes = 0;
  bool crowded = false;  // ranks share cores: to meet is to wait for others' turns
  // Shared, by node of the tree: 0, or 1 + the partial sum that is the half of the node that came first. Null: one rank.
  std::atomic<int32_t>* halves = nullptr;
  // Rank r's slot of the epoch that the next sync ends (before it), or that the last sync ended (`after`). Between arrive and await
  // the epoch has not ended, and a rank reads what it wrote itself.
  virtual char* slot(int r) = 0;
  virtual char* slot_after(int r) = 0;
  // Publishes what this rank wrote and waits until every rank called it too. `tag` names the operation and its size:
  // ranks that meet with different tags are told so. Throws std::runtime_error naming the rank that died, is late, or differs.
  void sync(uint64_t tag) { arrive(tag), await(); }
  virtual void arrive(uint64_t tag) = 0;  // the first half: publishes
  virtual void await() = 0;               // ... and waits
};

}  // namespace lockstep
