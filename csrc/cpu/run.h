// Runs a kernel for Python: without the interpreter lock, its status turned into an exception.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>
#include <string>

#include "cpu/arguments.h"

namespace dsts::cpu {

template <class F>
void run_unlocked(const Arguments& check, F kernel) {
  Status status;
  {
    const pybind11::gil_scoped_release unlocked;
    status = kernel();
  }
  if (status == Status::bad_neuron)
    throw std::out_of_range(std::string(check.op()) + ": a neuron index is outside 0..N-1");
  if (status == Status::no_memory) throw std::bad_alloc();
}

template <class A>
void run(const Arguments& check, Status (*kernel)(const A&), const A& arguments) {
  run_unlocked(check, [&] { return kernel(arguments); });
}

// Where a fast convolution adds up the time of its stages, or null: see Winograd.
inline double* stage_seconds_of(const Arguments& check, pybind11::handle value) {
  const Tensor t = check.dense("stage_seconds", value, 1, true);
  if (t.given())
    check.dtype_is("stage_seconds", t.dtype(), kFloat64),
        check.size_is("stage_seconds", "stages", t.sizes[0], 4);
  return static_cast<double*>(t.data);
}

void bind_frozen(pybind11::module_& m);  // frozen_bindings.cpp
void bind_live(pybind11::module_& m);    // live_bindings.cpp

}  // namespace dsts::cpu
