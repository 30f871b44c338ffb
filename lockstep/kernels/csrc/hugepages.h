// Memory for weights, in huge pages where the system grants them.
//
// A decode step reads every weight once, so it runs at the speed of memory, and with 4 KiB pages a core spends a good part
// of that on page walks. Weights are carved from large blocks, so that many small ones share huge pages.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lockstep {

// Zeroed memory, aligned to 4096. Asks for huge pages; without them it is ordinary memory. Throws std::bad_alloc.
void* huge_alloc(size_t bytes);
void huge_free(void* p);  // a block goes back to the system with the last piece in it

int64_t huge_used();     // bytes handed out
int64_t huge_granted();  // bytes of our blocks that lie in huge pages now; -1 where the system does not tell

}  // namespace lockstep
