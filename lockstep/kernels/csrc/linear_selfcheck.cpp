// Whether the kernels compute what they should on this very processor: asked once, when the library is loaded.
#include <algorithm>
#include <cmath>

#include "amx.h"
#include "gemm.h"
#include "packed.h"

namespace lockstep {

namespace {

// A few different numbers that bfloat16 holds: -2.5 ... 2.5
float sample(int64_t i) { return float(i * 7919 % 11 - 5) * 0.5f; }

struct CountWrong : Sink {
  const std::vector<uint16_t>&a, &b;
  int64_t n, k;
  mutable int64_t wrong = 0;
  CountWrong(const std::vector<uint16_t>& a, const std::vector<uint16_t>& b, int64_t n, int64_t k) : a(a), b(b), n(n), k(k) {}

  void take(int64_t p, int64_t row, int64_t rows, const float* sums, int64_t) const override {
    auto value = [](uint16_t bits) { return double(to_float(bf16{bits})); };
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < std::min(PANEL, n - p * PANEL); c++) {
        double want = 0;
        for (int64_t i = 0; i < k; i++) want += value(a[size_t((row + r) * k + i)]) * value(b[size_t((p * PANEL + c) * k + i)]);
        wrong += !(std::abs(want - double(sums[r * PANEL + c])) <= 1e-3);  // the sums are small multiples of 1/4: nothing rounds
      }
  }
};

}  // namespace


int64_t linear_selfcheck() {
#if defined(LOCKSTEP_TILES)
  if (!amx_request()) return -1;
#endif
  constexpr int64_t M = 37, N = 70, K = 100;
  std::vector<uint16_t> a(M * K), b(N * K);
  for (size_t i = 0; i < a.size(); i++) a[i] = uint16_t(as<uint32_t>(sample(int64_t(i))) >> 16);
  for (size_t i = 0; i < b.size(); i++) b[i] = uint16_t(as<uint32_t>(sample(int64_t(i * i + 3))) >> 16);
  int64_t bounds[] = {0, 33, K};
  auto w = pack_bf16(b.data(), N, K, bounds, 2);
  CountWrong check(a, b, N, K);
  Lane alone{0, 1, nullptr};
  for (int64_t m : {int64_t(1), int64_t(7), M}) gemm(*w, {a.data(), DType::BF16, K}, m, check, alone);
  return check.wrong;
}

}  // namespace lockstep
