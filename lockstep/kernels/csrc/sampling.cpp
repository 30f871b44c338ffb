// Choosing tokens from logits. Each row by itself, in a fixed order, so that nothing else in the batch can change a choice.
#include "sampling.h"

#include "bind.h"
#include "sampling_logprobs.h"
#include "team.h"

namespace lockstep {
namespace {

// The first element of x[0, n) that equals `what`, or the first NaN if that is one.
int64_t first(const float* x, int64_t n, float what) {
  for (int64_t j = 0; j < n; j++)
    if (what == what ? x[j] == what : x[j] != x[j]) return j;
  return 0;
}

// The first of the largest elements; the first NaN, if there is one (as numpy's argmax).
int64_t argmax(const float* x, int64_t n) {
  constexpr int64_t RUNS = 4, BLOCK = 16 * RUNS * W;  // a maximum has no order, so several may be on their way at once
  float top = -INFINITY;
  int64_t at = 0;  // the block in which it was met first
  for (int64_t start = 0; start < n; start += BLOCK) {
    const float* p = x + start;
    const int64_t count = std::min(BLOCK, n - start);
    f32x16 most[RUNS];
    i32x16 nans = {};
    for (f32x16& m : most) m = splat(-INFINITY);
    int64_t j = 0;
    for (; j + RUNS * W <= count; j += RUNS * W)
      for (int64_t r = 0; r < RUNS; r++) {
        const f32x16 v = load(p + j + r * W);
        nans |= v != v;
        most[r] = vmax(most[r], v);
      }
    float here = max_lanes(vmax(vmax(most[0], most[1]), vmax(most[2], most[3])));
    bool nan = any(nans);
    for (; j < count; j++) {
      nan |= p[j] != p[j];
      here = here > p[j] ? here : p[j];
    }
    if (nan) return start + first(p, count, NAN);
    if (here > top) top = here, at = start;
  }
  return at + first(x + at, std::min(BLOCK, n - at), top);
}

// What cuts a row's distribution, as in protocol/sampling.py.
struct Cuts {
  double temperature, min_p;
  int64_t top_k;
  double top_p;
};

// Fills `weights` with what may be drawn from a row; false: its argmax, which is set, is the only choice.
bool weigh(const float* x, int64_t n, const Cuts& cuts, Weights& weights, int64_t& best) {
  best = argmax(x, n);
  if (cuts.temperature <= 0 || !std::isfinite(x[best])) return false;
  weights.fill(x, n, double(x[best]), cuts.temperature, cuts.min_p);
  if (cuts.top_k > 0 && cuts.top_k < n) weights.keep_top_k(cuts.top_k);
  if (cuts.top_p < 1) weights.keep_top_p(cuts.top_p);
  return true;
}

// Calls f(row) for each row. Shared out to the team's threads where that takes longer (about `ns` in all) than to wake them.
template <class F>
void for_rows(int64_t rows, int64_t ns, F&& f) {
  if (rows == 1 || ns < 200'000) {
    for (int64_t r = 0; r < rows; r++) f(r);
    return;
  }
  team().run([&](Lane& lane) {
    for (int64_t r = lane.first(rows); r < lane.last(rows); r++) f(r);
  });
}

// ids, values: [rows]; values may be null.
void argmax_rows(const float* logits, int64_t rows, int64_t vocab, int64_t ld, int64_t* ids, float* values) {
  for_rows(rows, rows * vocab / 16, [&](int64_t r) {
    ids[r] = argmax(logits + r * ld, vocab);
    if (values) values[r] = logits[r * ld + ids[r]];
  });
}

// u, temperature (0: take the argmax), min_p, top_k, top_p, ids: [rows].
void draw_rows(const float* logits, int64_t rows, int64_t vocab, int64_t ld, const double* u, const double* temperature, const double* min_p,
               const int64_t* top_k, const double* top_p, int64_t* ids) {
  for_rows(rows, rows * vocab, [&](int64_t r) {
    thread_local Weights weights;
    const Cuts cuts{temperature[r], min_p[r], top_k[r], top_p[r]};
    if (weigh(logits + r * ld, vocab, cuts, weights, ids[r])) ids[r] = weights.draw(u[r]);
  });
}

// What draw_rows inverts, for tests: out [vocab], the share of ids up to each. The row has finite logits.
void draw_shares(const float* x, int64_t vocab, double temperature, double min_p, int64_t top_k, double top_p, double* out) {
  Weights weights;
  int64_t best;
  if (!weigh(x, vocab, {temperature, min_p, top_k, top_p}, weights, best)) throw std::invalid_argument("the row has no distribution");
  weights.shares(out);
}

// tokens, own, ranks: [rows]; ids, values: [rows, count], count <= vocab. A row that is no distribution has NaN.
void logprob_rows(const float* logits, int64_t rows, int64_t vocab, int64_t ld, const int64_t* tokens, int64_t count, float* own,
                  int64_t* ranks, int64_t* ids, float* values) {
  for_rows(rows, rows * vocab, [&](int64_t r) {
    thread_local Logprobs logprobs;
    const float* x = logits + r * ld;
    const float most = x[argmax(x, vocab)];
    if (std::isfinite(most)) return logprobs.row(x, vocab, most, tokens[r], count, own + r, ranks + r, ids + r * count, values + r * count);
    own[r] = NAN, ranks[r] = 1;
    for (int64_t i = 0; i < count; i++) ids[r * count + i] = i, values[r * count + i] = NAN;
  });
}

}  // namespace

extern const std::vector<PyMethodDef> sampling_methods;
const std::vector<PyMethodDef> sampling_methods = {BIND(argmax_rows), BIND(draw_rows), BIND(draw_shares), BIND(logprob_rows)};

}  // namespace lockstep
