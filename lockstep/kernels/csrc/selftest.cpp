// What tests need to see of the team and of the number types, and nothing else calls.
#include <atomic>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "simd.h"
#include "team.h"

namespace lockstep {
namespace {

// `rounds` barriers. Before each, every thread writes its mark; after it, each must see everybody's. Returns how often one
// did not. pause: thread (round modulo size) comes late by that many relaxations, so that the others must wait for it.
int64_t selftest_barriers(int64_t rounds, int64_t pause) {
  struct alignas(64) Mark { int64_t at[2] = {-1, -1}; };  // not atomic: that a barrier makes them visible is the point
  std::vector<Mark> marks(64);  // not as many as the team is: it may be replaced before the job begins
  std::atomic<int64_t> wrong{0};
  team().run([&](Lane& lane) {
    if (size_t(lane.size) > marks.size()) throw std::invalid_argument("at most 64 threads");
    for (int64_t r = 0; r < rounds; r++) {
      for (int64_t i = 0; i < pause && r % lane.size == lane.id; i++) relax();
      marks[size_t(lane.id)].at[r % 2] = r;
      lane.barrier();
      for (int i = 0; i < lane.size; i++) wrong += marks[size_t(i)].at[r % 2] != r;
    }
  });
  return wrong;
}

// counts[0, n) is incremented where a thread's share lies; ids[i] becomes the thread's.
void selftest_shares(int64_t n, int64_t* counts, int64_t* ids) {
  team().run([&](Lane& lane) {
    for (int64_t i = lane.first(n); i < lane.last(n); i++) counts[i]++, ids[i] = lane.id;
  });
}

// counts[0, n) is incremented for each item taken, `loops` times over; thread 0 works `slow` relaxations on each of its items.
void selftest_takes(int64_t n, int64_t loops, int64_t slow, int64_t* counts, int64_t* ids) {
  team().run([&](Lane& lane) {
    for (int64_t l = 0; l < loops; l++, lane.barrier()) {
      lane.begin(n);
      for (int64_t i; (i = lane.take()) >= 0;) {
        for (int64_t s = 0; s < slow && lane.id == 0; s++) relax();
        counts[i]++, ids[i] = lane.id;  // not atomic: nobody else may have the item
      }
    }
  });
}

// Thread `id` (-1: all, -2: none) throws before its barrier number `at` of `barriers`; the others go on to theirs.
// invalid: throw std::invalid_argument. Returns how many threads came to the end.
int64_t selftest_throw(int64_t id, int64_t at, int64_t barriers, bool invalid) {
  std::atomic<int64_t> ended{0};
  team().run([&](Lane& lane) {
    for (int64_t b = 0; b < barriers; b++) {
      if (b == at && (id == lane.id || id == -1)) {
        const std::string what = "thread " + std::to_string(lane.id) + " at " + std::to_string(at);
        if (invalid) throw std::invalid_argument(what);
        throw std::runtime_error(what);
      }
      lane.barrier();
    }
    ended++;
  });
  return ended;
}

// A job that starts a job, or reshapes the team, which must be refused.
void selftest_nested(bool reshape) {
  team().run([&](Lane& lane) {
    if (lane.id != lane.size - 1) return;
    if (reshape) team().reshape(1, {});
    else team().run([](Lane&) {});
  });
}

// dst [n] of `dtype` from src, and back from there to `again`.
void selftest_convert(const float* src, int64_t n, int64_t dtype, void* dst, float* again) {
  dispatch(DType(dtype), [&](auto tag) {
    using T = decltype(tag);
    T* out = static_cast<T*>(dst);
    for (int64_t j = 0; j < n; j += W) {
      store_n(out + j, load_n(src + j, n - j), n - j);
      store_n(again + j, load_n(out + j, n - j), n - j);
    }
  });
}

// out = exp(x), tanh(x) [n]
void selftest_exp(const float* x, int64_t n, float* out, float* tanhs) {
  for (int64_t j = 0; j < n; j += W) {
    store_n(out + j, vexp(load_n(x + j, n - j)), n - j);
    store_n(tanhs + j, vtanh(load_n(x + j, n - j)), n - j);
  }
}

}  // namespace

extern const std::vector<PyMethodDef> selftest_methods;
const std::vector<PyMethodDef> selftest_methods = {
    BIND(selftest_barriers), BIND(selftest_shares), BIND(selftest_takes),  BIND(selftest_throw), BIND(selftest_nested),
    BIND(selftest_convert),  BIND(selftest_exp),     BIND(missed_wakes),
};

}  // namespace lockstep
