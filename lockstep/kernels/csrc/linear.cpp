#include "bind.h"

namespace lockstep {
extern const std::vector<PyMethodDef> linear_methods;
const std::vector<PyMethodDef> linear_methods = {};
}  // namespace lockstep
