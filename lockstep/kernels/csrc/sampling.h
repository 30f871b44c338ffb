// The weights of one row's tokens: cut down to those that may be drawn, then drawn from.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "sampling_exp.h"

namespace lockstep {

// Weights in the order of ids, in float64. They lie in blocks with a sum and a maximum each, so that a cut or a draw
// touches only the blocks that have something left. Every sum has one order, a function of the row alone.
class Weights {
 public:
  // exp((x - most) / temperature), those under min_p zero. x: [n] without NaN, its largest element `most` finite.
  void fill(const float* x, int64_t n, double most, double temperature, double min_p) {
    n_ = n;
    const size_t blocks = size_t((n + BLOCK - 1) / BLOCK);
    w_.resize(blocks * BLOCK);
    sums_.resize(blocks), tops_.resize(blocks);
    for (size_t b = 0; b < blocks; b++) {
      each(b, [&](int64_t j, f64x8) {
        const f64x8 v = vexp_below_0((load_widened(x + j, n - j) - most) / temperature);
        return v < min_p ? splat_f64(0) : v;
      });
    }
  }

  // Keeps the k largest, and all that equal the k-th.
  void keep_top_k(int64_t k) {
    double least = 0;  // the k-th largest of the blocks' maxima: no more than the k-th largest weight
    if (k <= int64_t(tops_.size())) {
      pool_ = tops_;
      std::nth_element(pool_.begin(), pool_.begin() + (k - 1), pool_.end(), std::greater<double>());
      least = pool_[size_t(k - 1)];
    }
    const Cut cut = smallest_set(least, double(k), [](double) { return 1.0; });
    keep_from(cut.last);
  }

  // Keeps the smallest set of largest weights that holds the share p of the total; of those equal to the last, the
  // lower ids. What lies under (1 - p) total / n adds up to less than (1 - p) total, so the set lies above that.
  void keep_top_p(double p) {
    const double sum = total(), most = *std::max_element(tops_.begin(), tops_.end());
    const Cut cut = smallest_set(std::min((1 - p) * sum / double(n_), most), p * sum, [](double w) { return w; });
    keep_from(cut.last);
    if (cut.surplus) drop_equals(cut.last, cut.equals);
  }

  // The first id at which the running sum exceeds u times the total.
  int64_t draw(double u) const {
    const double sum = total(), target = std::min(u * sum, std::nextafter(sum, 0.0));
    double before = 0;
    size_t b = 0;
    while (before + sums_[b] <= target) before += sums_[b++];
    int64_t chosen = 0;
    for (int64_t j = int64_t(b) * BLOCK, end = j + BLOCK; j < end; j++) {
      if (w_[size_t(j)] == 0) continue;
      chosen = j;  // where rounding leaves the target just past the block's end: its last id
      before += w_[size_t(j)];
      if (before > target) break;
    }
    return chosen;
  }

  // [n] the share of ids up to each, for tests.
  void shares(double* out) const {
    const double sum = total();
    double before = 0;
    for (int64_t j = 0; j < n_; j++) out[j] = (before += sums_[size_t(j / BLOCK)] > 0 ? w_[size_t(j)] : 0) / sum;
  }

 private:
  static constexpr int64_t BLOCK = 128;
  static constexpr int64_t BUCKETS = 4096;  // 64 to an octave: the last one also has all below 2^-64

  struct Cut {
    double last;      // the smallest weight that stays
    int64_t equals;   // how many of those equal to it stay,
    bool surplus;     // and whether there are more
  };

  // Sets each vector of block b to f(index of its first element, vector) and sums the block up.
  template <class F>
  void each(size_t b, F&& f) {
    f64x8 sum = splat_f64(0), top = splat_f64(0);
    for (int64_t j = int64_t(b) * BLOCK, end = j + BLOCK; j < end; j += WD) {
      const f64x8 v = f(j, load_raw<f64x8>(&w_[size_t(j)]));
      store_raw(&w_[size_t(j)], v);
      sum += v;
      top = v > top ? v : top;
    }
    sums_[b] = sum_lanes(sum);
    tops_[b] = max_lanes(top);
  }

  double total() const {
    double sum = 0;
    for (double s : sums_) sum += s;
    return sum;
  }

  // Calls f with the vectors that hold a weight in [least, most], in the order of ids.
  template <class F>
  void within(double least, double most, F&& f) const {
    for (size_t b = 0; b < tops_.size(); b++) {
      if (tops_[b] == 0 || tops_[b] < least) continue;
      for (int64_t j = int64_t(b) * BLOCK, end = j + BLOCK; j < end; j += WD) {
        const f64x8 v = load_raw<f64x8>(&w_[size_t(j)]);
        if (any((v >= least) & (v <= most))) f(v);
      }
    }
  }

  // Weights are at most 1, and larger ones have larger bits: 64 buckets to an octave, from 1 down.
  static int64_t bucket(double w) { return std::min((as<int64_t>(1.0) - as<int64_t>(w)) >> 46, BUCKETS - 1); }
  static double bucket_top(int64_t b) { return as<double>(as<int64_t>(1.0) - (b << 46)); }
  static double bucket_end(int64_t b) { return b == BUCKETS - 1 ? 0.0 : as<double>(as<int64_t>(1.0) - ((b + 1) << 46) + 1); }

  // From the largest down, a weight stays while the measure of those before it is under `goal`. 1. The measure of each
  // bucket. 2. The bucket in which the goal is reached. 3. Its weights, sorted. What is under `least` need not be looked at.
  template <class Measure>
  Cut smallest_set(double least, double goal, Measure&& measure) {
    measures_.assign(size_t(BUCKETS), 0.0);
    within(least, 1.0, [&](f64x8 v) {
      for (int i = 0; i < WD; i++) measures_[size_t(bucket(v[i]))] += measure(v[i]);
    });
    double before = 0;
    int64_t b = 0;
    while (b < BUCKETS && before + measures_[size_t(b)] < goal) before += measures_[size_t(b++)];
    if (b == BUCKETS) return {0.0, 0, false};  // all there are fall short of it
    pool_.clear();
    within(bucket_end(b), bucket_top(b), [&](f64x8 v) {
      for (int i = 0; i < WD; i++)
        if (bucket(v[i]) == b) pool_.push_back(v[i]);
    });
    std::sort(pool_.begin(), pool_.end(), std::greater<double>());
    size_t kept = 0;
    while (kept < pool_.size() && before < goal) before += measure(pool_[kept++]);
    const double last = pool_[kept - 1];
    const auto run = std::equal_range(pool_.begin(), pool_.end(), last, std::greater<double>());
    return {last, pool_.begin() + int64_t(kept) - run.first, run.second != pool_.begin() + int64_t(kept)};
  }

  void keep_from(double least) {
    for (size_t b = 0; b < tops_.size(); b++) {
      if (tops_[b] < least) sums_[b] = tops_[b] = 0;  // its weights are not looked at any more
      else each(b, [&](int64_t, f64x8 v) { return v < least ? splat_f64(0) : v; });
    }
  }

  void drop_equals(double w, int64_t keep) {
    for (size_t b = 0; b < tops_.size(); b++) {
      if (tops_[b] < w) continue;
      each(b, [&](int64_t, f64x8 v) {
        for (int i = 0; i < WD; i++)
          if (v[i] == w && keep-- <= 0) v[i] = 0;
        return v;
      });
    }
  }

  int64_t n_ = 0;
  std::vector<double> w_;            // padded with zeros to whole blocks
  std::vector<double> sums_, tops_;  // of blocks; both 0 where nothing is left, whatever w_ has there
  std::vector<double> measures_, pool_;
};

}  // namespace lockstep
