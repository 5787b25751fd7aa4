"""Native CPU kernels: C++ sources, the module built from them (`saap_index._cpu`), and the function that loads it."""
