// Log-probabilities of one row's tokens.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "sampling_exp.h"

namespace lockstep {

class Logprobs {
 public:
  // Of a row x [n] without NaN whose largest element `most` is finite. own, rank: of `token`; a rank counts the tokens
  // that are likelier, from 1. ids, values: [count] the likeliest, equals by id.
  void row(const float* x, int64_t n, float most, int64_t token, int64_t count, float* own, int64_t* rank, int64_t* ids, float* values) {
    int64_t above = 0;
    const double sum = scan(x, n, most, x[token], above);
    const auto logprob = [&](float v) { return float(double(v) - double(most) - std::log(sum)); };
    *own = logprob(x[token]);
    *rank = above + 1;
    if (count == 0) return;
    collect(x, n, count);
    const auto likelier = [](const Found& a, const Found& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; };
    std::partial_sort(found_.begin(), found_.begin() + count, found_.end(), likelier);
    for (int64_t i = 0; i < count; i++) ids[i] = found_[size_t(i)].second, values[i] = logprob(found_[size_t(i)].first);
  }

 private:
  using Found = std::pair<float, int64_t>;
  static constexpr int64_t BLOCK = 128;

  // The sum of exp(x - most), always in one order. Counts the elements above `mine`, and keeps each block's maximum.
  double scan(const float* x, int64_t n, float most, float mine, int64_t& above) {
    tops_.clear();
    double total = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
      f64x8 sum = splat_f64(0), top = splat_f64(-INFINITY);
      i64x8 more = {};
      for (int64_t j = start, end = std::min(start + BLOCK, n); j < end; j += WD) {
        const f64x8 v = load_widened(x + j, n - j);
        sum += vexp_below_0(v - double(most));
        top = v > top ? v : top;
        more -= v > double(mine);  // a true comparison is -1
      }
      total += sum_lanes(sum);
      tops_.push_back(float(max_lanes(top)));
      for (int i = 0; i < WD; i++) above += more[i];
    }
    return total;
  }

  // At least `count` elements, the largest among them. All from the count-th largest of the blocks' maxima on will do.
  void collect(const float* x, int64_t n, int64_t count) {
    float least = -INFINITY;
    if (count <= int64_t(tops_.size())) {
      bounds_ = tops_;
      std::nth_element(bounds_.begin(), bounds_.begin() + (count - 1), bounds_.end(), std::greater<float>());
      least = bounds_[size_t(count - 1)];
    }
    found_.clear();
    for (int64_t start = 0; start < n; start += BLOCK)
      if (tops_[size_t(start / BLOCK)] >= least)
        for (int64_t j = start, end = std::min(start + BLOCK, n); j < end; j++)
          if (x[j] >= least) found_.emplace_back(x[j], j);
  }

  std::vector<float> tops_, bounds_;
  std::vector<Found> found_;
};

}  // namespace lockstep
