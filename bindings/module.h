// The parts of the Python module saap_index._cpu that have files of their own.
#pragma once
#include <nanobind/nanobind.h>

namespace saap {

void define_paged(nanobind::module_&);

}  // namespace saap
