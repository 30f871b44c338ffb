// The two products of attention over cached chunks: scores (lanes are keys) and weighted values (lanes are dims).
//
// Each output element is one chain of multiply-adds in a fixed order, from zero: a score over the dims, a value over the
// keys. How many queries, chunks and dims one call computes side by side changes no element's chain.
#pragma once
#include <type_traits>

#include "attention_lanes.h"
#include "kv.h"

namespace lockstep {

constexpr int64_t SPAN = 256;  // keys of one softmax: see attention.h
constexpr int64_t SPAN_CHUNKS = SPAN / CHUNK;

// How a cached vector (PACK<T> elements a lane) is multiplied. `Value` is what queries and probabilities are kept as:
// PER of them make up PACK<T> elements.
template <class T>
struct Dot {  // float32, float16: widened
  using Value = float;
  static constexpr int64_t PER = 1;
  struct Cached { lanes x; };
  struct Other { lanes x; };
  static LS_INLINE Cached cached(const T* p) { return {widened(p)}; }
  static LS_INLINE Other other(const float* p) { return {all(*p)}; }
  static LS_INLINE lanes add(lanes acc, const Cached& a, const Other& b) { return multiply_add(a.x, b.x, acc); }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<bf16> {
  using Value = uint32_t;  // two bfloat16, as they lie in memory
  static constexpr int64_t PER = 1;
  struct Cached { __m512i x; };
  struct Other { __m512i x; };
  static LS_INLINE Cached cached(const bf16* p) { return {_mm512_loadu_si512(p)}; }
  static LS_INLINE Other other(const uint32_t* p) { return {_mm512_set1_epi32(int(*p))}; }
  static LS_INLINE lanes add(lanes acc, const Cached& a, const Other& b) { return (lanes)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a.x, (__m512bh)b.x); }
};
#else
template <>
struct Dot<bf16> {
  using Value = float;
  static constexpr int64_t PER = 2;
  struct Cached { lanes x, y; };
  struct Other { lanes x, y; };
  static LS_INLINE Cached cached(const bf16* p) {
    const lanes_u32 both = load_raw<lanes_u32>(p);
    return {as<lanes>(both << 16), as<lanes>(both & 0xffff0000u)};
  }
  static LS_INLINE Other other(const float* p) { return {all(p[0]), all(p[1])}; }
  static LS_INLINE lanes add(lanes acc, const Cached& a, const Other& b) { return multiply_add(a.y, b.y, multiply_add(a.x, b.x, acc)); }
};
#endif

template <class T>
using Value = typename Dot<T>::Value;
template <class T>
constexpr int64_t VALUES_PER_CHUNK = CHUNK / PACK<T> * Dot<T>::PER;  // probabilities of one chunk

// A query head [n] as `Value`s.
template <class T>
inline void put_query(const T* q, int64_t n, Value<T>* out) {
  if constexpr (std::is_same_v<Value<T>, float>) {
    for (int64_t j = 0; j < n; j += W) store_n(out + j, load_n(q + j, n - j), n - j);
  } else {
    memcpy(out, q, size_t(n) * sizeof(T));
  }
}

// The weights of the next LANES keys as `Value`s at place `i` of those vectors; returns what they are worth there.
template <class T>
LS_INLINE lanes put_weights(lanes p, Value<T>* at, int64_t i) {
  Value<T>* out = at + i * VALUES_PER_CHUNK<T> * LANES / CHUNK;
#if defined(__AVX512BF16__)
  if constexpr (PACK<T> == 2) {
    __m256i narrow = (__m256i)_mm512_cvtneps_pbh((__m512)p);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow);
    return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
  } else
#endif
  {
    store_raw(out, p);
    return p;
  }
}

// Memory is slower than the multiplications, so what is needed a stage later is asked for in the same strides: with AHEAD,
// chunk ahead[c] comes into the second-level cache while chunk c is multiplied.

// scores[q * SPAN + c * 16 + i] = query q times key i of chunk c, for the LANES keys from `first` on. queries: stride ldq.
template <class T, int NQ, int NC, bool AHEAD>
void score_tile(const T* const* keys, const T* const* ahead, int64_t first, const Value<T>* queries, int64_t ldq, int64_t head_dim, float* scores) {
  using D = Dot<T>;
  lanes acc[NQ][NC];
#pragma GCC unroll 16
  for (int q = 0; q < NQ; q++) {
#pragma GCC unroll 16
    for (int c = 0; c < NC; c++) acc[q][c] = lanes{};
  }
  const T *k[NC], *a[NC];
  for (int c = 0; c < NC; c++) k[c] = keys[c] + first * PACK<T>, a[c] = ahead[c];
  for (int64_t d = 0; d < head_dim; d += PACK<T>, queries += D::PER) {
    typename D::Cached key[NC];
#pragma GCC unroll 16
    for (int c = 0; c < NC; c++) {
      if (AHEAD) __builtin_prefetch(a[c] + d * CHUNK, 0, 3);
      key[c] = D::cached(k[c] + d * CHUNK);
    }
#pragma GCC unroll 16
    for (int q = 0; q < NQ; q++) {
      auto query = D::other(queries + q * ldq);
#pragma GCC unroll 16
      for (int c = 0; c < NC; c++) acc[q][c] = D::add(acc[q][c], key[c], query);
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < NQ; q++) {
#pragma GCC unroll 16
    for (int c = 0; c < NC; c++) store_raw(scores + q * SPAN + c * CHUNK + first, acc[q][c]);
  }
}

// The first n dims of one vector of cached values, without reading past them.
template <class T>
LS_INLINE typename Dot<T>::Cached cached_n(const T* p, int64_t n) {
  if (n >= LANES) return Dot<T>::cached(p);
  T part[LANES * PACK<T>] = {};
  memcpy(part, p, size_t(n * PACK<T>) * sizeof(T));
  return Dot<T>::cached(part);
}

// out[q * ldo + d] = sum over the keys of `chunks` chunks of weight times value, for NV vectors of dims from `first` on,
// of which the last may be cut short by head_dim (TAIL).
template <class T, int NQ, int NV, bool TAIL, bool AHEAD>
void value_tile(const T* const* values, const T* const* ahead, int64_t chunks, const Value<T>* weights, int64_t ldw, int64_t first, int64_t head_dim, float* out, int64_t ldo) {
  using D = Dot<T>;
  lanes acc[NQ][NV];
#pragma GCC unroll 16
  for (int q = 0; q < NQ; q++) {
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) acc[q][j] = lanes{};
  }
  for (int64_t c = 0; c < chunks; c++) {
    const T *v = values[c] + first * PACK<T>, *a = ahead[c] + first * PACK<T>;
#pragma GCC unroll 1  // unrolled, all prefetches would come first and wait for each other
    for (int64_t t = 0; t < CHUNK / PACK<T>; t++, v += head_dim * PACK<T>, a += head_dim * PACK<T>, weights += D::PER) {
      typename D::Cached value[NV];
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) {
        if (AHEAD) __builtin_prefetch(a + j * LANES * PACK<T>, 0, 3);
        value[j] = TAIL ? cached_n(v + j * LANES * PACK<T>, head_dim - first - j * LANES) : D::cached(v + j * LANES * PACK<T>);
      }
#pragma GCC unroll 16
      for (int q = 0; q < NQ; q++) {
        auto weight = D::other(weights + q * ldw);
#pragma GCC unroll 16
        for (int j = 0; j < NV; j++) acc[q][j] = D::add(acc[q][j], value[j], weight);
      }
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < NQ; q++) {
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) store_raw(out + q * ldo + first + j * LANES, acc[q][j]);  // rows of `out` are whole vectors
  }
}

// How much is computed side by side: what the registers hold.
#if defined(__AVX512F__)
constexpr int QUERIES = 4, CHUNKS = 4, FEW_QUERIES_CHUNKS = 8, VECTORS = 4;
#else
constexpr int QUERIES = 4, CHUNKS = 2, FEW_QUERIES_CHUNKS = 4, VECTORS = 2;
#endif

template <class T, int NQ, int NC, bool AHEAD>
LS_INLINE void score_chunks(const T* const* keys, const T* const* ahead, const Value<T>* queries, int64_t ldq, int64_t head_dim, float* scores) {
  score_tile<T, NQ, NC, AHEAD>(keys, ahead, 0, queries, ldq, head_dim, scores);
  for (int64_t first = LANES; first < CHUNK; first += LANES) score_tile<T, NQ, NC, false>(keys, keys, first, queries, ldq, head_dim, scores);
}

template <class T, int NQ, bool AHEAD>
void score_rows(const T* const* keys, const T* const* ahead, int64_t chunks, const Value<T>* queries, int64_t ldq, int64_t head_dim, float* scores) {
  constexpr int WIDE = 2 * NQ <= QUERIES ? FEW_QUERIES_CHUNKS : CHUNKS;
  int64_t c = 0;
  for (; c + WIDE <= chunks; c += WIDE) score_chunks<T, NQ, WIDE, AHEAD>(keys + c, ahead + c, queries, ldq, head_dim, scores + c * CHUNK);
  for (; c + 2 <= chunks; c += 2) score_chunks<T, NQ, 2, AHEAD>(keys + c, ahead + c, queries, ldq, head_dim, scores + c * CHUNK);
  for (; c < chunks; c++) score_chunks<T, NQ, 1, AHEAD>(keys + c, ahead + c, queries, ldq, head_dim, scores + c * CHUNK);
}

template <class T, int NQ, bool AHEAD>
void value_rows(const T* const* values, const T* const* ahead, int64_t chunks, const Value<T>* weights, int64_t ldw, int64_t head_dim, float* out, int64_t ldo) {
  int64_t d = 0;
  for (; d + VECTORS * LANES <= head_dim; d += VECTORS * LANES)
    value_tile<T, NQ, VECTORS, false, AHEAD>(values, ahead, chunks, weights, ldw, d, head_dim, out, ldo);
  for (; d + LANES <= head_dim; d += LANES) value_tile<T, NQ, 1, false, AHEAD>(values, ahead, chunks, weights, ldw, d, head_dim, out, ldo);
  if (d < head_dim) value_tile<T, NQ, 1, true, AHEAD>(values, ahead, chunks, weights, ldw, d, head_dim, out, ldo);
}

// Calls f for groups of queries with their number and whether they are the first ones, as constants: f(n, first, q).
template <class F>
LS_INLINE void by_queries(int64_t queries, F&& f) {
  auto rest = [&](auto first, int64_t q) {
    if constexpr (QUERIES > 2) {
      if (queries - q == 3) f(std::integral_constant<int, 3>(), first, q);
      if (queries - q == 2) f(std::integral_constant<int, 2>(), first, q);
    }
    if (queries - q == 1) f(std::integral_constant<int, 1>(), first, q);
  };
  if (queries < QUERIES) return rest(std::true_type(), 0);
  f(std::integral_constant<int, QUERIES>(), std::true_type(), 0);
  int64_t q = QUERIES;
  for (; q + QUERIES <= queries; q += QUERIES) f(std::integral_constant<int, QUERIES>(), std::false_type(), q);
  rest(std::false_type(), q);
}

}  // namespace lockstep
