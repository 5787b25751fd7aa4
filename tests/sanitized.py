"""A pytest plugin: `saap_index._cpu` comes from the file that SANITIZED_MODULE names, and runs the code for SANITIZED_ISA."""

import importlib.util
import os
import sys

_spec = importlib.util.spec_from_file_location("saap_index._cpu", os.environ["SANITIZED_MODULE"])
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["saap_index._cpu"] = _module
_spec.loader.exec_module(_module)
if os.environ["SANITIZED_ISA"] in _module.isas():  # another architecture has fewer
    _module.set_isa(os.environ["SANITIZED_ISA"])
