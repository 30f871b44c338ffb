// Python functions from plain C++ functions: BIND(f) takes the arguments' types from f's signature.
//
// Pointers are Python integers (a tensor's data_ptr(), or a handle that another function returned; 0 and None are null),
// int64_t and double are numbers, const char* is str, bool is bool. The interpreter lock is released during the call.
// std::invalid_argument becomes ValueError, any other exception RuntimeError. Only Python's limited API is used, so one
// library serves every Python, and nothing of torch is included, so it serves every torch.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace lockstep {

template <class T>
bool from_python(PyObject* o, T& out) {
  if constexpr (std::is_same_v<T, const char*>) {
    out = PyUnicode_AsUTF8AndSize(o, nullptr);
    return out != nullptr;
  } else if constexpr (std::is_pointer_v<T>) {
    out = o == Py_None ? nullptr : reinterpret_cast<T>(PyLong_AsSize_t(o));
  } else if constexpr (std::is_floating_point_v<T>) {
    out = T(PyFloat_AsDouble(o));
  } else if constexpr (std::is_same_v<T, bool>) {
    out = PyObject_IsTrue(o) == 1;
  } else {
    static_assert(std::is_same_v<T, int64_t>, "bind int64_t, double, bool, const char* and pointers only");
    out = PyLong_AsLongLong(o);
  }
  return !PyErr_Occurred();
}

template <class T>
PyObject* to_python(T v) {
  if constexpr (std::is_same_v<T, const char*>) return PyUnicode_FromString(v);
  else if constexpr (std::is_pointer_v<T>) return PyLong_FromSize_t(reinterpret_cast<size_t>(v));
  else if constexpr (std::is_floating_point_v<T>) return PyFloat_FromDouble(v);
  else if constexpr (std::is_same_v<T, bool>) return PyBool_FromLong(v);
  else return PyLong_FromLongLong(v);
}

// A Python exception is set in this thread.
struct PythonError : std::exception {
  const char* what() const noexcept override { return "a Python exception"; }
};

// The state of the interpreter's thread that this one is, while it is within a call without the interpreter's lock.
inline thread_local PyThreadState* python_thread = nullptr;

template <auto F, class R, class... A, size_t... I>
PyObject* call(PyObject* const* args, std::index_sequence<I...>) {
  std::tuple<A...> a;
  if (!(from_python(args[I], std::get<I>(a)) && ...)) return nullptr;
  python_thread = PyEval_SaveThread();
  auto back = [] { PyEval_RestoreThread(std::exchange(python_thread, nullptr)); };
  try {
    if constexpr (std::is_void_v<R>) {
      F(std::get<I>(a)...);
      back();
      Py_INCREF(Py_None);
      return Py_None;
    } else {
      R r = F(std::get<I>(a)...);
      back();
      return to_python(r);
    }
  } catch (const PythonError&) {
    back();
  } catch (const std::invalid_argument& e) {
    back();
    PyErr_SetString(PyExc_ValueError, e.what());
  } catch (const std::exception& e) {
    back();
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  return nullptr;
}

template <auto F>
struct Bound;
template <class R, class... A, R (*F)(A...)>
struct Bound<F> {
  static PyObject* fast(PyObject*, PyObject* const* args, Py_ssize_t n) {
    if (n != Py_ssize_t(sizeof...(A))) return PyErr_Format(PyExc_TypeError, "takes %d arguments, got %zd", int(sizeof...(A)), n);
    return call<F, R, A...>(args, std::index_sequence_for<A...>{});
  }
};

#define BIND(f) PyMethodDef{#f, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&::lockstep::Bound<f>::fast)), METH_FASTCALL, nullptr}

}  // namespace lockstep
