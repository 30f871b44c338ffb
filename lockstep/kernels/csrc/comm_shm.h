// The segment: one piece of memory that the ranks of a group share, and one rank's view of it.
//
//   header | one Line per rank | one Ring per ordered pair of ranks | rings' bytes | two slots per rank
//
// Every number in it has one writer, except the counts of sleepers and the bell, which are only added to, and the halves of sums,
// which are exchanged. So there is no lock that a dying rank could hold.
#pragma once
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "comm.h"
#include "team.h"

namespace lockstep {

constexpr int MAX_WORLD = 64;  // ranks of one group on one host
// Before a rank that waits for another sleeps it hands its core on, to whoever has work there: being woken takes tens of
// microseconds where the machine is a virtual one. For so long (per rank that is waited for) where every thread has a core; ranks
// that share one hand it to each other, so often: with more, ranks that only look take the time of those who work.
constexpr double YIELD_S = 1e-3;
constexpr int YIELDS = 10;
enum class Presence : uint32_t { Absent, Here, Left, Failed };

struct alignas(64) Line {  // what one rank tells the others
  std::atomic<uint32_t> arrived;  // syncs it has come to
  std::atomic<uint32_t> presence;
  std::atomic<uint64_t> tag[2];   // of the sync with that parity
  int64_t pid, birth;
  char reason[208];  // why it failed
};

struct alignas(64) Ring {  // bytes on their way from one rank to another
  alignas(64) std::atomic<uint32_t> written;  // bytes so far, modulo 2^32; the sender's
  std::atomic<uint32_t> sender_sleeps;
  alignas(64) std::atomic<uint32_t> read;     // the receiver's
  std::atomic<uint32_t> receiver_sleeps;
};

struct Header {
  alignas(64) char token[32];  // the segment's secret name: whoever opened the right one finds it
  alignas(64) std::atomic<uint32_t> bell;  // rung by the last to arrive at a sync, when somebody sleeps
  alignas(64) std::atomic<uint32_t> sleepers;
  alignas(64) std::atomic<int32_t> halves[MAX_NODES];
};

struct Transfer;  // a send or receive under way: comm_p2p.cpp

class ShmGroup : public Group {
 public:
  // Maps `fd` (kept by the caller). ranks [world]: what messages call them. Throws std::runtime_error where it cannot.
  ShmGroup(int fd, int rank, int world, size_t slot_bytes, size_t ring_bytes, double timeout_s, bool may_spin, const char* name,
           const int64_t* ranks);
  ~ShmGroup() override;
  static size_t bytes(int world, size_t slot_bytes, size_t ring_bytes);

  char* slot(int r) override { return slots_ + (size_t(r) * 2 + (epoch_ & 1)) * slot_bytes; }
  char* slot_after(int r) override { return slots_ + (size_t(r) * 2 + (~epoch_ & 1)) * slot_bytes; }
  void arrive(uint64_t tag) override;
  void await() override;
  bool may_spin() const { return may_spin_; }
  double waited_s() const { return waited_s_; }
  char* token() { return header_->token; }

  std::string number(int r) const { return std::to_string(ranks_[size_t(r)]); }  // what messages call rank r
  // Keeps this group failed, tells the other ranks, throws.
  [[noreturn]] void fail(const std::string& text);
  void tell_failed(const std::string& text);

  // Sends or receives (comm_p2p.cpp): what can be moved is moved at once; null when that was all. dtype: see make_tag.
  Transfer* post(bool send, int peer, char* data, size_t bytes, int dtype);
  bool test(Transfer* t);  // whether it is done
  void wait(Transfer* t);
  void drop(Transfer* t);  // forgets the handle, not the transfer: its data must live until it is done

 private:
  Ring& ring(int from, int to) { return rings_[from * world + to]; }
  char* ring_data(int from, int to) { return ring_data_ + (size_t(from) * size_t(world) + size_t(to)) * ring_bytes_; }
  template <class Here>
  bool stay_awake(const Here& here) const;  // until here(), which it returns, or until sleeping is better
  void wait_for(int r, uint32_t epoch, uint64_t tag);
  bool all_arrived(uint32_t epoch) const;
  void check_tags(uint32_t epoch, uint64_t tag);
  // Throws when `peer` cannot come any more, or is later than the group's timeout.
  void look_at(int peer, const std::string& what, double since, const std::function<bool()>& done);
  void check() const;
  std::string who(int r) const;
  void heed_signals();
  bool advance();                  // all transfers, as far as they go; whether anything moved
  bool advance(Transfer& t);
  void help();                     // the helper thread's work
  bool pending() const;

  std::string name_, failed_;
  std::vector<int64_t> ranks_;
  double timeout_s_;
  bool may_spin_;
  uint32_t epoch_ = 0;
  double waited_s_ = 0;  // in syncs so far, for ranks that came later: who waits least is who the others wait for
  size_t mapped_ = 0, ring_bytes_;
  char *base_ = nullptr, *ring_data_ = nullptr, *slots_ = nullptr;
  Header* header_ = nullptr;
  Line* lines_ = nullptr;
  Ring* rings_ = nullptr;
  std::mutex moving_;  // guards what follows: the helper moves bytes too
  std::condition_variable posted_;
  std::map<Transfer*, std::shared_ptr<Transfer>> handles_;  // those that Python may still ask for
  std::vector<std::deque<std::shared_ptr<Transfer>>> sends_, receives_;  // by peer, in the order they were posted
  std::thread helper_;
  std::atomic<bool> stop_{false};
};

template <class Here>
bool ShmGroup::stay_awake(const Here& here) const {
  const int64_t spin = spin_ns.load(std::memory_order_relaxed);  // 0: threads share cores, though ranks may not
  if (!may_spin_ || !spin) {
    for (int i = 0; i < YIELDS; i++) {
      sched_yield();
      if (here()) return true;
    }
    return false;
  }
  // The first look at the clock comes late: who meets at once does not pay for it.
  for (int i = 0; i < 64; i++, relax())
    if (here()) return true;
  const double began = now_s(), spun = began + 1e-9 * double(spin);
  while (now_s() < spun)
    for (int i = 0; i < 64; i++, relax())
      if (here()) return true;
  while (now_s() < began + YIELD_S) {
    sched_yield();
    if (here()) return true;
  }
  return false;
}

std::string tag_text(uint64_t tag);
std::string seconds_text(double s);
int64_t process_birth(int64_t pid);              // start time in ticks since boot; 0: unknown
bool process_alive(int64_t pid, int64_t birth);  // a zombie is not

}  // namespace lockstep
