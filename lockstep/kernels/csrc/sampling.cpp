// Choosing tokens from logits. Each row by itself, in a fixed order, so that nothing else in the batch can change a choice.
#include <algorithm>
#include <cmath>
#include <functional>

#include "bind.h"
#include "simd.h"
#include "team.h"

namespace lockstep {
namespace {

// The first of the largest elements; the first NaN, if there is one (as numpy's argmax).
int64_t argmax(const float* x, int64_t n) {
  f32x16 most = splat(-INFINITY);
  i32x16 nans = {};
  for (int64_t j = 0; j < n; j += W) {
    const int64_t count = std::min<int64_t>(W, n - j);
    f32x16 v = count == W ? load(x + j) : splat(-INFINITY);
    for (int64_t i = 0; count < W && i < count; i++) v[i] = x[j + i];
    nans |= v != v;
    most = vmax(most, v);
  }
  bool any = false;
  for (int i = 0; i < W; i++) any |= nans[i] != 0;
  const float top = max_lanes(most);
  for (int64_t j = 0; j < n; j++)
    if (any ? x[j] != x[j] : x[j] == top) return j;
  return 0;
}

constexpr int64_t BLOCK = 256;  // of the running sum

// One row's choice. `weights` is scratch of n floats, `sorted` of whatever size it grows to.
struct Draw {
  double u, temperature, min_p, top_p;
  int64_t top_k;

  int64_t operator()(const float* x, int64_t n, std::vector<float>& weights, std::vector<float>& sorted) const {
    const int64_t best = argmax(x, n);
    if (!std::isfinite(x[best])) return best;  // all banned, or not a distribution
    weights.resize(size_t(n));
    const f32x16 most = splat(x[best]), inverse = splat(float(1.0 / temperature));
    for (int64_t j = 0; j < n; j += W) {
      const int64_t count = std::min<int64_t>(W, n - j);
      store_n(weights.data() + j, vexp((load_n(x + j, count) - most) * inverse), count);
    }
    if (min_p > 0) cut(weights, float(min_p));
    if (top_k > 0 && top_k < n) {
      sorted = weights;
      std::nth_element(sorted.begin(), sorted.begin() + (top_k - 1), sorted.end(), std::greater<float>());
      cut(weights, sorted[size_t(top_k - 1)]);
    }
    if (top_p < 1) nucleus(weights, sorted);
    return invert(weights);
  }

  static void cut(std::vector<float>& weights, float least) {
    for (float& w : weights) w = w < least ? 0.f : w;
  }
  static double block_sum(const float* w, int64_t n) {
    double part[8] = {};
    int64_t j = 0;
    for (; j + 8 <= n; j += 8)
      for (int i = 0; i < 8; i++) part[i] += double(w[j + i]);
    for (; j < n; j++) part[0] += double(w[j]);
    return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
  }
  static double total(const std::vector<float>& weights) {
    double sum = 0;
    for (size_t at = 0; at < weights.size(); at += BLOCK) sum += block_sum(&weights[at], std::min<int64_t>(BLOCK, int64_t(weights.size() - at)));
    return sum;
  }
  // Keeps the smallest set of largest weights that holds the share top_p of the total. What lies under
  // (1 - top_p) total / n adds up to less than the rest, so only what lies above is sorted. Of equals, lower ids stay.
  void nucleus(std::vector<float>& weights, std::vector<float>& sorted) const {
    const double sum = total(weights);
    const float floor = float(std::min((1 - top_p) * sum / double(weights.size()) * (1 - 1e-6), double(*std::max_element(weights.begin(), weights.end()))));
    sorted.clear();
    for (float w : weights)
      if (w >= floor && w > 0) sorted.push_back(w);
    std::sort(sorted.begin(), sorted.end(), std::greater<float>());
    double before = 0;
    size_t kept = 0;
    while (kept < sorted.size() && before < top_p * sum) before += double(sorted[kept++]);
    const float last = sorted[kept ? kept - 1 : 0];
    int64_t equals = 0;
    for (size_t i = 0; i < kept; i++) equals += sorted[i] == last;
    for (float& w : weights) {
      if (w < last) w = 0;
      else if (w == last && equals-- <= 0) w = 0;
    }
  }
  // The first id at which the running sum exceeds u times the total.
  int64_t invert(const std::vector<float>& weights) const {
    const double sum = total(weights), target = std::min(u * sum, std::nextafter(sum, 0.0));
    double before = 0;
    int64_t chosen = 0;
    for (size_t at = 0; at < weights.size(); at += BLOCK) {
      const int64_t n = std::min<int64_t>(BLOCK, int64_t(weights.size() - at));
      const double here = block_sum(&weights[at], n);
      if (before + here > target) {
        for (int64_t j = 0; j < n; j++) {
          if (weights[at + size_t(j)] <= 0) continue;
          chosen = int64_t(at) + j;  // where rounding leaves the target just past the block's end, its last id
          before += double(weights[at + size_t(j)]);
          if (before > target) break;
        }
        return chosen;
      }
      before += here;
    }
    return chosen;
  }
};

// ids, values: [rows]; values may be null.
void argmax_rows(const float* logits, int64_t rows, int64_t vocab, int64_t ld, int64_t* ids, float* values) {
  auto one = [&](int64_t r) {
    ids[r] = argmax(logits + r * ld, vocab);
    if (values) values[r] = logits[r * ld + ids[r]];
  };
  if (rows == 1) return one(0);
  team().run([&](Lane& lane) {
    for (int64_t r = lane.first(rows); r < lane.last(rows); r++) one(r);
  });
}

// u, temperature, min_p, top_k, top_p, ids: [rows].
void draw_rows(const float* logits, int64_t rows, int64_t vocab, int64_t ld, const double* u, const double* temperature, const double* min_p,
               const int64_t* top_k, const double* top_p, int64_t* ids) {
  team().run([&](Lane& lane) {
    std::vector<float> weights, sorted;
    for (int64_t r = lane.first(rows); r < lane.last(rows); r++)
      ids[r] = Draw{u[r], temperature[r], min_p[r], top_p[r], top_k[r]}(logits + r * ld, vocab, weights, sorted);
  });
}

}  // namespace

extern const std::vector<PyMethodDef> sampling_methods;
const std::vector<PyMethodDef> sampling_methods = {BIND(argmax_rows), BIND(draw_rows)};

}  // namespace lockstep
