#include "bind.h"

namespace lockstep {
extern const std::vector<PyMethodDef> comm_methods;
const std::vector<PyMethodDef> comm_methods = {};
}  // namespace lockstep
