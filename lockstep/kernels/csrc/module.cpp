// The Python module: every file's table of functions, joined.
#include "bind.h"

namespace lockstep {
extern const std::vector<PyMethodDef> program_methods, packed_methods, linear_methods, attention_methods, rowwise_methods, sampling_methods, comm_methods, row_methods, embed_methods,
    selftest_methods;
}

namespace lockstep {
void check_signals() {
  if (!python_thread) return;
  PyEval_RestoreThread(python_thread);
  const bool raised = PyErr_CheckSignals() != 0;
  python_thread = PyEval_SaveThread();
  if (raised) throw PythonError();
}
}  // namespace lockstep

static const char* variant() { return LOCKSTEP_VARIANT; }

PyMODINIT_FUNC PyInit__lockstep_kernels() {
  using namespace lockstep;
  static std::vector<PyMethodDef> methods;  // Python keeps pointers into it
  if (methods.empty()) {
    for (auto* table : {&program_methods, &packed_methods, &linear_methods, &attention_methods, &rowwise_methods, &sampling_methods, &comm_methods, &row_methods, &embed_methods, &selftest_methods})
      methods.insert(methods.end(), table->begin(), table->end());
    methods.push_back(BIND(variant));
    methods.push_back({nullptr, nullptr, 0, nullptr});
  }
  // In two phases, so that every load makes a module of its own: of the other kind Python keeps one for all of a name, and several
  // variants in one process would find each other's functions in it.
  static PyModuleDef_Slot none[] = {{0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_lockstep_kernels", nullptr, 0, nullptr, none, nullptr, nullptr, nullptr};
  module.m_methods = methods.data();
  return PyModuleDef_Init(&module);
}
