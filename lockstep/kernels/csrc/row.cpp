#include "bind.h"

namespace lockstep {
extern const std::vector<PyMethodDef> row_methods;
const std::vector<PyMethodDef> row_methods = {};
}  // namespace lockstep
