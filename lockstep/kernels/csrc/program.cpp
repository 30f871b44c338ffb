#include "program.h"

#include "bind.h"

namespace lockstep {

int64_t Program::run(const Step& step, int64_t first) {
  int64_t stop = -1, last = int64_t(ops.size()), narrow = last;
  Step narrowed = step;
  if (step.wanted) narrowed.tokens = step.num_wanted;
  for (int64_t i = 0; i < int64_t(ops.size()); i++)
    if (ops[size_t(i)].op->narrows()) narrow = i;
  for (int64_t i = first; i < last; i++)
    if (ops[size_t(i)].op->stops()) {
      stop = last = i;
      break;
    }
  if (timed) began.resize(ops.size()), ended.resize(ops.size());
  team().run([&](Lane& lane) {
    for (int64_t i = first; i < last; i++) {
      if (timed && lane.id == 0) began[size_t(i)] = now_s();
      ops[size_t(i)].op->run(i > narrow ? narrowed : step, lane);
      lane.barrier();
      if (timed && lane.id == 0) ended[size_t(i)] = now_s();
    }
  });
  return stop;
}

namespace {

struct Stop : Op {
  void run(const Step&, Lane&) override {}
  bool stops() const override { return true; }
};

// Moves the wanted tokens' rows of two buffers to the front.
struct Narrow : Op {
  struct Buffer {
    char* data;
    int64_t bytes;  // of a row
  } buffers[2];
  Narrow(Buffer a, Buffer b) : buffers{a, b} {}
  bool narrows() const override { return true; }
  void run(const Step& step, Lane& lane) override {
    if (!step.wanted) return;
    for (const Buffer& b : buffers) {
      // Every thread has some columns, in which it goes from the first row on: no row is written before it was moved.
      const int64_t from = lane.first(b.bytes), size = lane.last(b.bytes) - from;
      for (int64_t i = 0; i < step.num_wanted; i++)
        if (step.wanted[i] != i) memcpy(b.data + i * b.bytes + from, b.data + step.wanted[i] * b.bytes + from, size_t(size));
    }
  }
};

struct OwnStep : Step {  // with the arrays that follow from requests' lengths and blocks
  std::vector<int64_t> query_starts, own_positions, own_slots;
};

Program* program_new() { return new Program(); }
void program_free(Program* p) { delete p; }
int64_t program_add(Program* p, Op* op, const char* name) {
  p->ops.push_back({std::unique_ptr<Op>(op), name});
  return int64_t(p->ops.size()) - 1;
}
int64_t program_size(Program* p) { return int64_t(p->ops.size()); }
int64_t program_run(Program* p, OwnStep* step, int64_t first) { return p->run(*step, first); }
void program_timed(Program* p, int64_t on) { p->timed = on != 0; }
// began, ended: [size] doubles
void program_times(Program* p, double* began, double* ended) {
  for (size_t i = 0; i < p->ops.size() && i < p->began.size(); i++) began[i] = p->began[i], ended[i] = p->ended[i];
}
Op* op_stop() { return new Stop(); }
// Two buffers, bytes of a row each.
Op* op_narrow(void* a, int64_t a_bytes, void* b, int64_t b_bytes) {
  return new Narrow({static_cast<char*>(a), a_bytes}, {static_cast<char*>(b), b_bytes});
}

OwnStep* step_new() { return new OwnStep(); }
void step_free(OwnStep* s) { delete s; }
void step_set(OwnStep* s, int64_t tokens, const int64_t* ids, const int64_t* positions, const int64_t* slots, int64_t rows,
              const int64_t* query_start, const int64_t* seq_lens, const int32_t* tables, int64_t table_stride, const int64_t* wanted, int64_t num_wanted) {
  static_cast<Step&>(*s) = Step{tokens, ids, positions, slots, rows, query_start, seq_lens, tables, table_stride, wanted, num_wanted};
}

// As step_set, of `rows` requests: row i computes the last query_lens[i] of its seq_lens[i] tokens.
void step_set_rows(OwnStep* s, const int64_t* ids, int64_t rows, const int64_t* query_lens, const int64_t* seq_lens, const int32_t* tables, int64_t table_stride,
                   int64_t block_size, const int64_t* wanted, int64_t num_wanted) {
  s->query_starts.assign(1, 0), s->own_positions.clear(), s->own_slots.clear();
  for (int64_t i = 0; i < rows; i++) {
    if (query_lens[i] < 1 || query_lens[i] > seq_lens[i]) throw std::invalid_argument("a row computes at least one token and at most its length");
    if (seq_lens[i] > table_stride * block_size) throw std::invalid_argument("a row has fewer blocks than its tokens take");
    for (int64_t at = seq_lens[i] - query_lens[i]; at < seq_lens[i]; at++) {
      s->own_positions.push_back(at);
      s->own_slots.push_back(tables[i * table_stride + at / block_size] * block_size + at % block_size);
    }
    s->query_starts.push_back(int64_t(s->own_positions.size()));
  }
  step_set(s, s->query_starts.back(), ids, s->own_positions.data(), s->own_slots.data(), rows, s->query_starts.data(), seq_lens, tables, table_stride, wanted, num_wanted);
}

void team_set(int64_t threads, const int* cores, int64_t n_cores) {
  team().reshape(threads, std::vector<int>(cores, cores + n_cores));
}
int64_t team_size() { return team().size(); }
void set_spin_ns(int64_t ns) { spin_ns = ns; }
double clock_s() { return now_s(); }

}  // namespace

extern const std::vector<PyMethodDef> program_methods;
const std::vector<PyMethodDef> program_methods = {
    BIND(program_new),  BIND(program_free), BIND(program_add), BIND(program_size), BIND(program_run), BIND(program_timed),
    BIND(program_times), BIND(op_stop),     BIND(op_narrow),    BIND(step_new),    BIND(step_free),    BIND(step_set),    BIND(step_set_rows), BIND(team_set),
    BIND(team_size),    BIND(set_spin_ns),  BIND(clock_s),
};

}  // namespace lockstep
