#include "bind.h"

namespace lockstep {
extern const std::vector<PyMethodDef> rowwise_methods;
const std::vector<PyMethodDef> rowwise_methods = {};
}  // namespace lockstep
