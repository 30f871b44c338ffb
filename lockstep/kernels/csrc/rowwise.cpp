// Norms and activations as operations of a program.
#include "rowwise.h"

#include "activate.h"
#include "bind.h"
#include "program.h"

namespace lockstep {
namespace {

template <class T>
T* at(void* base, int64_t row, int64_t ld) { return static_cast<T*>(base) + row * ld; }
template <class T>
const T* at(const void* base, int64_t row, int64_t ld) { return static_cast<const T*>(base) + row * ld; }

struct Norm : Op {
  const void* src;    // [tokens, width], or null: norm the residual
  void* residual;     // null: no residual
  const void* weight; // [width]
  void* dst;
  int64_t lds, ldr, ldd, width;
  float eps;
  bool plus_one;
  DType type;

  void run(const Step& step, Lane& lane) override {
    dispatch(type, [&](auto t) {
      using T = decltype(t);
      for (int64_t i = lane.first(step.tokens); i < lane.last(step.tokens); i++) {
        const T* x = at<T>(src, i, lds);
        if (residual) {
          T* r = at<T>(residual, i, ldr);
          add_row<T>(x, r, width);
          x = r;
        }
        rms_norm_row<T>(x, static_cast<const T*>(weight), at<T>(dst, i, ldd), width, eps, plus_one);
      }
    });
  }
};

struct GatedAct : Op {
  const void* src;  // [tokens, gate | up]
  void* dst;        // [tokens, width]
  int64_t lds, ldd, width;
  int kind;
  DType type;

  void run(const Step& step, Lane& lane) override {
    dispatch(type, [&](auto t) {
      using T = decltype(t);
      for (int64_t i = lane.first(step.tokens); i < lane.last(step.tokens); i++) {
        const T* gate = at<T>(src, i, lds);
        T* out = at<T>(dst, i, ldd);
        for (int64_t j = 0; j < width; j += W) {
          const int64_t count = std::min<int64_t>(W, width - j);
          store_n(out + j, activate(load_n(gate + j, count), load_n(gate + width + j, count), kind), count);
        }
      }
    });
  }
};

Op* make_norm(const void* src, int64_t lds, void* residual, int64_t ldr, const void* weight, void* dst, int64_t ldd, int64_t width, double eps, bool plus_one, int64_t dtype) {
  auto* op = new Norm();
  op->src = src, op->residual = residual, op->weight = weight, op->dst = dst;
  op->lds = lds, op->ldr = ldr, op->ldd = ldd, op->width = width;
  op->eps = float(eps), op->plus_one = plus_one, op->type = DType(dtype);
  return op;
}
Op* op_norm(const void* src, int64_t lds, const void* weight, void* dst, int64_t ldd, int64_t width, double eps, bool plus_one, int64_t dtype) {
  return make_norm(src, lds, nullptr, 0, weight, dst, ldd, width, eps, plus_one, dtype);
}
Op* op_add_norm(const void* delta, int64_t ldx, void* residual, int64_t ldr, const void* weight, void* dst, int64_t ldd, int64_t width, double eps, bool plus_one, int64_t dtype) {
  return make_norm(delta, ldx, residual, ldr, weight, dst, ldd, width, eps, plus_one, dtype);
}
Op* op_gated_act(const void* src, int64_t lds, void* dst, int64_t ldd, int64_t width, int64_t activation, int64_t dtype) {
  auto* op = new GatedAct();
  op->src = src, op->dst = dst, op->lds = lds, op->ldd = ldd, op->width = width, op->kind = int(activation), op->type = DType(dtype);
  return op;
}

}  // namespace

extern const std::vector<PyMethodDef> rowwise_methods;
const std::vector<PyMethodDef> rowwise_methods = {BIND(op_norm), BIND(op_add_norm), BIND(op_gated_act)};

}  // namespace lockstep
