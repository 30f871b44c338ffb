// The linear layers as operations of a step, and what Python calls.
#include <algorithm>

#include "activate.h"
#include "bind.h"
#include "gemm.h"
#include "program.h"

namespace lockstep {

namespace {

// Bias in the order of the packed columns, float32; empty where there is none.
std::vector<float> packed_bias(const Packed& w, const void* bias, DType type) {
  std::vector<float> out;
  if (!bias) return out;
  out.resize(size_t(w.panels * PANEL));
  dispatch(type, [&](auto tag) {
    for (int64_t i = 0; i < w.panels * PANEL; i++)
      if (int64_t row = w.source(i / PANEL, i % PANEL); row >= 0) out[size_t(i)] = to_float(static_cast<const decltype(tag)*>(bias)[row]);
  });
  return out;
}

struct Output {
  char* data;
  int64_t ld;
  DType type;
  template <class T>
  T* at(int64_t row, int64_t column) const { return reinterpret_cast<T*>(data) + row * ld + column; }
};

struct PartialsSink : Sink {
  const Packed& w;
  float* out;
  int64_t ldo, subtree_stride;
  PartialsSink(const Packed& w, float* out, int64_t ldo, int64_t subtree_stride) : w(w), out(out), ldo(ldo), subtree_stride(subtree_stride) {}

  void take(int64_t p, int64_t row, int64_t rows, const float* sums, int64_t stride) const override {
    int64_t width = std::min(PANEL, w.n - p * PANEL);
    for (int64_t s = 0; s < w.subtrees; s++)
      for (int64_t r = 0; r < rows; r++)
        memcpy(out + s * subtree_stride + (row + r) * ldo + p * PANEL, sums + s * stride + r * PANEL, size_t(width) * sizeof(float));
  }
};

struct FinishSink : Sink {
  const Packed& w;
  Output out;
  std::vector<float> bias;
  FinishSink(const Packed& w, Output out, std::vector<float> bias) : w(w), out(out), bias(std::move(bias)) {}

  const float* of(const std::vector<float>& v, int64_t i) const { return v.empty() ? nullptr : v.data() + i; }
  f32x16 finished(const float* sums, int64_t i, int64_t c) const { return finish(load(sums + c), of(w.scale, i + c), of(bias, i + c)); }
};

struct LinearSink : FinishSink {
  using FinishSink::FinishSink;
  void take(int64_t p, int64_t row, int64_t rows, const float* sums, int64_t) const override {
    int64_t n = p * PANEL, width = std::min(PANEL, w.n - n);
    dispatch(out.type, [&](auto tag) {
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < width; c += W) store_n(out.at<decltype(tag)>(row + r, n + c), finished(sums + r * PANEL, n, c), width - c);
    });
  }
};

struct GatedSink : FinishSink {
  Activation activation;
  GatedSink(const Packed& w, Output out, std::vector<float> bias, Activation activation) : FinishSink(w, out, std::move(bias)), activation(activation) {}

  void take(int64_t p, int64_t row, int64_t rows, const float* sums, int64_t) const override {
    int64_t n = p * HALF, width = std::min(HALF, w.n / 2 - n);
    dispatch(out.type, [&](auto tag) {
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < width; c += W) {
          const float* line = sums + r * PANEL;
          f32x16 v = activate(finished(line, p * PANEL, c), finished(line, p * PANEL, HALF + c), activation);
          store_n(out.at<decltype(tag)>(row + r, n + c), v, width - c);
        }
    });
  }
};

struct LinearOp : Op {
  const Packed& w;
  Rows src;
  std::unique_ptr<Sink> sink;
  LinearOp(const Packed& w, Rows src, std::unique_ptr<Sink> sink) : w(w), src(src), sink(std::move(sink)) {}
  void run(const Step& step, Lane& lane) override { gemm(w, src, step.tokens, *sink, lane); }
};

const Packed& whole(const Packed* w) {
  if (w->subtrees == 1) return *w;
  throw std::invalid_argument("this weight has only some atoms of its layer: their sums need the collective that finishes the tree");
}

Op* op_linear(const Packed* w, const void* src, int64_t lds, int64_t src_dtype, void* dst, int64_t ldd, int64_t dst_dtype, const void* bias) {
  if (w->gated) throw std::invalid_argument("a gated weight goes to op_gated");
  Output out{static_cast<char*>(dst), ldd, DType(dst_dtype)};
  auto sink = std::make_unique<LinearSink>(whole(w), out, packed_bias(*w, bias, DType(src_dtype)));
  return new LinearOp(*w, {src, DType(src_dtype), lds}, std::move(sink));
}

Op* op_gated(const Packed* w, const void* src, int64_t lds, int64_t dtype, void* dst, int64_t ldd, const void* bias, int64_t activation) {
  if (!w->gated) throw std::invalid_argument("op_gated takes a weight packed with gate and up side by side");
  Output out{static_cast<char*>(dst), ldd, DType(dtype)};
  auto sink = std::make_unique<GatedSink>(whole(w), out, packed_bias(*w, bias, DType(dtype)), Activation(activation));
  return new LinearOp(*w, {src, DType(dtype), lds}, std::move(sink));
}

// Outside a step: gemm_partials by the whole team, out [subtrees, m, n].
void linear_partials(const Packed* w, const void* src, int64_t src_dtype, int64_t lds, int64_t m, float* out) {
  team().run([&](Lane& lane) { gemm_partials(*w, src, DType(src_dtype), lds, m, out, w->n, m * w->n, lane); });
}

}  // namespace

void gemm_partials(const Packed& w, const void* a, DType at, int64_t lda, int64_t m, float* out, int64_t ldo, int64_t out_subtree_stride, Lane& lane) {
  if (w.gated) throw std::invalid_argument("a gated weight has no partial sums by column");
  gemm(w, {a, at, lda}, m, PartialsSink(w, out, ldo, out_subtree_stride), lane);
}

extern const std::vector<PyMethodDef> linear_methods;
const std::vector<PyMethodDef> linear_methods = {BIND(op_linear), BIND(op_gated), BIND(linear_partials), BIND(linear_selfcheck)};

}  // namespace lockstep
