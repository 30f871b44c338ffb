#include "bind.h"

namespace lockstep {
extern const std::vector<PyMethodDef> attention_methods;
const std::vector<PyMethodDef> attention_methods = {};
}  // namespace lockstep
