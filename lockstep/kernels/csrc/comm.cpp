// The functions that Python sees. A group is a ShmGroup*, a transfer a Transfer*.
#include "comm.h"

#include <cstring>

#include "bind.h"
#include "comm_shm.h"

namespace lockstep {

void all_reduce(ShmGroup& g, void* x, int64_t n, int64_t dtype);
void combine(ShmGroup& g, const float* in, float* out, const int64_t* counts, const int64_t* code, int64_t n_code, int64_t n);
void reduce_scatter(ShmGroup& g, const void* in, void* out, const int64_t* counts, int64_t dtype);
void gather(ShmGroup& g, Call call, int64_t dtype, const char* in, char* out, int64_t outer, const int64_t* inner, uint64_t detail);
void broadcast(ShmGroup& g, char* x, int64_t bytes, int src, int64_t dtype);
void largest(ShmGroup& g, const float* values, const int64_t* ids, int64_t rows, int64_t* out);
void all_to_all(ShmGroup& g, const char* in, char* out, const int64_t* send, const int64_t* recv, int64_t dtype);

namespace {

int64_t shm_bytes(int64_t world, int64_t slot_bytes, int64_t ring_bytes) { return int64_t(ShmGroup::bytes(int(world), size_t(slot_bytes), size_t(ring_bytes))); }
ShmGroup* shm_new(int64_t fd, int64_t rank, int64_t world, int64_t slot_bytes, int64_t ring_bytes, double timeout_s, bool may_spin, const char* name,
                   const int64_t* ranks) {
  return new ShmGroup(int(fd), int(rank), int(world), size_t(slot_bytes), size_t(ring_bytes), timeout_s, may_spin, name, ranks);
}
void shm_fail(ShmGroup* g, const char* reason) { g->fail(reason); }
void shm_free(ShmGroup* g) { delete g; }
double shm_waited_s(ShmGroup* g) { return g->waited_s(); }
void shm_barrier(ShmGroup* g) { g->sync(make_tag(Call::Barrier, 255, 0)); }
void shm_all_reduce(ShmGroup* g, void* x, int64_t n, int64_t dtype) { all_reduce(*g, x, n, dtype); }
void shm_combine(ShmGroup* g, const float* in, float* out, const int64_t* counts, const int64_t* code, int64_t n_code, int64_t n) {
  combine(*g, in, out, counts, code, n_code, n);
}
void shm_reduce_scatter(ShmGroup* g, const void* in, void* out, const int64_t* counts, int64_t dtype) { reduce_scatter(*g, in, out, counts, dtype); }
void shm_all_gather(ShmGroup* g, const void* in, char* out, int64_t outer, const int64_t* inner, int64_t dtype) {
  gather(*g, Call::AllGather, dtype, static_cast<const char*>(in), out, outer, inner, shares_of(inner, g->world));
}
void shm_largest(ShmGroup* g, const float* values, const int64_t* ids, int64_t rows, int64_t* out) { largest(*g, values, ids, rows, out); }
// out: null where this rank only gives.
void shm_gather(ShmGroup* g, const void* in, char* out, int64_t outer, const int64_t* inner, int64_t dst, int64_t dtype) {
  gather(*g, Call::Gather, dtype, static_cast<const char*>(in), out, outer, inner, uint64_t(dst) + 1);
}
void shm_broadcast(ShmGroup* g, char* x, int64_t bytes, int64_t src, int64_t dtype) { broadcast(*g, x, bytes, int(src), dtype); }
void shm_all_to_all(ShmGroup* g, const void* in, char* out, const int64_t* send, const int64_t* recv, int64_t dtype) {
  all_to_all(*g, static_cast<const char*>(in), out, send, recv, dtype);
}
// A transfer under way, 0 when it is done already.
Transfer* shm_send(ShmGroup* g, int64_t peer, const void* data, int64_t bytes, int64_t dtype) {
  return g->post(true, int(peer), const_cast<char*>(static_cast<const char*>(data)), size_t(bytes), int(dtype));
}
Transfer* shm_receive(ShmGroup* g, int64_t peer, char* data, int64_t bytes, int64_t dtype) { return g->post(false, int(peer), data, size_t(bytes), int(dtype)); }
bool shm_test(ShmGroup* g, Transfer* t) { return g->test(t); }
void shm_wait(ShmGroup* g, Transfer* t) { g->wait(t); }
void shm_drop(ShmGroup* g, Transfer* t) { g->drop(t); }
// Whether an unrelated lookalike was opened: the token is 32 bytes that only this segment's creator knows.
void shm_sign(ShmGroup* g, const char* token) { strncpy(g->token(), token, sizeof(Header::token)); }
bool shm_signed(ShmGroup* g, const char* token) { return strncmp(g->token(), token, sizeof(Header::token)) == 0; }

}  // namespace

extern const std::vector<PyMethodDef> comm_methods;
const std::vector<PyMethodDef> comm_methods = {
    BIND(shm_bytes),   BIND(shm_new),     BIND(shm_free),           BIND(shm_sign),       BIND(shm_signed),
    BIND(shm_waited_s), BIND(shm_barrier), BIND(shm_combine), BIND(shm_reduce_scatter), BIND(shm_all_reduce), BIND(shm_all_gather), BIND(shm_gather), BIND(shm_largest),
    BIND(shm_broadcast), BIND(shm_all_to_all), BIND(shm_send), BIND(shm_receive), BIND(shm_test), BIND(shm_wait), BIND(shm_drop), BIND(shm_fail),
};

}  // namespace lockstep
