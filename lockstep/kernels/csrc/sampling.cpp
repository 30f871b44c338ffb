#include "bind.h"

namespace lockstep {
extern const std::vector<PyMethodDef> sampling_methods;
const std::vector<PyMethodDef> sampling_methods = {};
}  // namespace lockstep
