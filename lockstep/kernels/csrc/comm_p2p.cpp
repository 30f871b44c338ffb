// From one rank to another: a ring of bytes for each ordered pair, with the receiver's pace as the sender's limit.
//
// A message is its tag (8 bytes), then its data. Transfers of a pair are served in the order they were posted. Whoever waits
// for one moves all others too, so two ranks may both send before they receive; what nobody waits for, a helper thread moves.
#include <chrono>
#include <cstring>
#if defined(__linux__)
#include <sched.h>
#endif

#include "comm_shm.h"

namespace lockstep {

struct Transfer {
  bool send;
  int peer;
  char* data;
  size_t bytes;
  uint64_t tag;
  size_t done = 0;
  bool begun = false, finished = false;  // the tag has passed; all has passed
  std::string error = {};
  double since = now_s(), looked = since;
};

constexpr size_t PIECE = 128 << 10;  // published at once: the other side copies one while this side copies the next
constexpr double SLICE_S = 0.05, BUSY_SLICE_S = 0.0005;
constexpr double LONGEST_NAP_S = 0.02;

static void copy_in(char* ring, size_t size, uint32_t at, const char* from, size_t n) {
  size_t place = at & (size - 1), first = std::min(n, size - place);
  memcpy(ring + place, from, first);
  memcpy(ring, from + first, n - first);
}
static void copy_out(char* to, const char* ring, size_t size, uint32_t at, size_t n) {
  size_t place = at & (size - 1), first = std::min(n, size - place);
  memcpy(to, ring + place, first);
  memcpy(to + first, ring, n - first);
}

// Moves what can be moved of `t`, which is the first of its queue; whether anything moved.
bool ShmGroup::advance(Transfer& t) {
  Ring& r = t.send ? ring(rank, t.peer) : ring(t.peer, rank);
  char* bytes = t.send ? ring_data(rank, t.peer) : ring_data(t.peer, rank);
  std::atomic<uint32_t>&mine = t.send ? r.written : r.read, &sleeps = t.send ? r.receiver_sleeps : r.sender_sleeps;
  bool moved = false;
  while (!t.finished && t.error.empty()) {
    uint32_t filled = r.written.load(std::memory_order_acquire) - r.read.load(std::memory_order_acquire);
    size_t can = t.send ? ring_bytes_ - filled : filled, n;
    uint32_t at = mine.load(std::memory_order_relaxed);
    if (!t.begun) {
      n = sizeof t.tag;
      if (can < n) break;
      uint64_t theirs = t.tag;
      if (t.send) copy_in(bytes, ring_bytes_, at, reinterpret_cast<char*>(&t.tag), n);
      else copy_out(reinterpret_cast<char*>(&theirs), bytes, ring_bytes_, at, n);
      t.begun = true;
      if (theirs != t.tag)
        t.error = "ranks of group " + name_ + " differ: rank " + std::to_string(rank) + " waits for a " + tag_text(t.tag) + ", " + who(t.peer) + " made a " + tag_text(theirs) + ".";
    } else {
      n = std::min({can, t.bytes - t.done, PIECE});
      if (!n && t.done < t.bytes) break;
      if (t.send) copy_in(bytes, ring_bytes_, at, t.data + t.done, n);
      else copy_out(t.data + t.done, bytes, ring_bytes_, at, n);
      t.done += n;
    }
    t.finished = t.begun && t.done == t.bytes;
    mine.store(at + uint32_t(n));  // sequentially consistent: seen before the sleepers are looked at
    if (sleeps.load()) futex_wake_all(&mine, true);
    moved = true;
  }
  return moved;
}

bool ShmGroup::advance() {
  bool moved = false;
  for (auto* queues : {&receives_, &sends_})
    for (auto& queue : *queues)
      while (!queue.empty()) {
        moved |= advance(*queue.front());
        if (!queue.front()->finished) break;
        queue.pop_front();
      }
  return moved;
}

bool ShmGroup::pending() const {
  for (auto* queues : {&receives_, &sends_})
    for (auto& queue : *queues)
      if (!queue.empty()) return true;
  return false;
}

void ShmGroup::help() {
#if defined(__linux__)
  cpu_set_t all;  // not only where the rank computes: the kernel cuts this down to what is allowed
  memset(&all, 0xff, sizeof all);
  sched_setaffinity(0, sizeof all, &all);
#endif
  std::unique_lock<std::mutex> hold(moving_);
  double nap = BUSY_SLICE_S;  // longer and longer while nothing moves: a transfer may wait for minutes, or for ever
  while (!stop_) {
    if (!pending()) {
      posted_.wait(hold);
      nap = BUSY_SLICE_S;
    } else if (advance()) {
      nap = BUSY_SLICE_S;
    } else {
      posted_.wait_for(hold, std::chrono::duration<double>(nap));
      nap = std::min(2 * nap, LONGEST_NAP_S);
    }
  }
}

Transfer* ShmGroup::post(bool send, int peer, char* data, size_t bytes, int dtype) {
  check();
  auto t = std::make_shared<Transfer>(Transfer{send, peer, data, bytes, make_tag(Call::Send, dtype, bytes)});
  std::unique_lock<std::mutex> hold(moving_);
  auto& queue = (send ? sends_ : receives_)[size_t(peer)];
  queue.push_back(t);
  advance();
  if (t->finished) return nullptr;
  handles_[t.get()] = t;
  if (!helper_.joinable()) helper_ = std::thread([this] { help(); });
  hold.unlock();
  posted_.notify_one();
  return t.get();
}

bool ShmGroup::test(Transfer* t) {
  check();
  {
    std::lock_guard<std::mutex> hold(moving_);
    if (!t->finished) advance();
    if (t->finished) return true;
  }
  if (!t->error.empty()) fail(t->error);
  if (double now = now_s(); now - t->looked > SLICE_S) {
    t->looked = now;
    heed_signals();
    look_at(t->peer, (t->send ? "send" : "receive") + tag_text(t->tag).substr(4), t->since, [&] {
      std::lock_guard<std::mutex> hold(moving_);
      return advance() || t->finished;
    });
  }
  return false;
}

void ShmGroup::wait(Transfer* t) {
  Ring& r = t->send ? ring(rank, t->peer) : ring(t->peer, rank);
  // The number that the other side changes, and where it looks whether this side sleeps.
  std::atomic<uint32_t>&theirs = t->send ? r.read : r.written, &sleeps = t->send ? r.sender_sleeps : r.receiver_sleeps;
  t->since = now_s();
  bool moved = true;  // awake only where the other side is at work: a stage's wait for the one before is long, and its core another's
  for (;;) {
    uint32_t seen = theirs.load();
    if (test(t)) return;
    if (moved && stay_awake([&] { return theirs.load(std::memory_order_acquire) != seen; })) continue;
    sleeps.fetch_add(1);
    bool alone = [&] { std::lock_guard<std::mutex> hold(moving_); return handles_.size() <= 1; }();
    if (theirs.load() == seen) futex_wait(&theirs, seen, alone ? SLICE_S : BUSY_SLICE_S, true);
    moved = theirs.load() != seen;
    sleeps.fetch_sub(1);
  }
}

void ShmGroup::drop(Transfer* t) {
  std::lock_guard<std::mutex> hold(moving_);
  handles_.erase(t);
}

}  // namespace lockstep
