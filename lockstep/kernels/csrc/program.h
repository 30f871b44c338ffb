// A step of the model as a flat list of operations, run by all threads of the rank's team in one call.
//
// Python builds the list once, from the model's modules, with pointers to weights and activation buffers; each step then
// costs one call. Between two operations the team meets at a barrier, so an operation may read what the one before wrote.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "simd.h"
#include "team.h"

namespace lockstep {

// What changes from step to step. Filled by Python (step_set, step_set_rows); pointers belong to arrays that live through the step.
struct Step {
  int64_t tokens = 0;                 // rows of all activation buffers in this step
  const int64_t* ids = nullptr;       // [tokens]
  const int64_t* positions = nullptr; // [tokens]
  const int64_t* slots = nullptr;     // [tokens] KV slot = block * block_size + offset
  int64_t rows = 0;                   // requests in the step
  const int64_t* query_start = nullptr;  // [rows + 1] first token of each row
  const int64_t* seq_lens = nullptr;     // [rows] tokens in the cache after the step
  const int32_t* tables = nullptr;       // [rows, table_stride] KV blocks
  int64_t table_stride = 0;
  const int64_t* wanted = nullptr;  // [num_wanted] ascending: the tokens that are computed to the end; null: all of them
  int64_t num_wanted = 0;
};

struct Op {
  virtual ~Op() = default;
  // Every thread of the team calls it. What one thread writes, the others may read after the next barrier.
  virtual void run(const Step& step, Lane& lane) = 0;
  // True: the list stops here, so that Python does something (a collective that is not shared memory) before going on.
  virtual bool stops() const { return false; }
  // True: operations after this one see the wanted tokens only, as the first rows of all buffers.
  virtual bool narrows() const { return false; }
};

struct Program {
  struct Entry {
    std::unique_ptr<Op> op;
    std::string name;  // "layers.3.qkv"
  };
  std::vector<Entry> ops;
  std::vector<double> began, ended;  // by operation, seconds of the monotonic clock, of the last run that was timed
  bool timed = false;
  // Runs from operation `first`; returns the index of the stop it met, or -1 at the end.
  int64_t run(const Step& step, int64_t first);
};

}  // namespace lockstep
