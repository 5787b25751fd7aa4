"""The compiled module; everything else about the package stands in setup.cfg."""

import os
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain

import nanobind
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


class BuildAtOnce(build_ext):
    """Compiles as many files at a time as there are cores; setuptools takes one after the other."""

    def build_extension(self, ext):
        compile_some = self.compiler.compile

        def compile_all(sources, *args, **options):
            longest_first = sorted(sources, key=lambda x: "kernels" not in x)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(chain.from_iterable(pool.map(lambda x: compile_some([x], *args, **options), longest_first)))

        self.compiler.compile = compile_all
        super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildAtOnce},
    # What measures the library lies with the benchmarks, and is installed beside it.
    packages=[
        *find_packages(include=["saap_index*"], exclude=["saap_index.cuda*"]),
        "saap_index.cuda",  # device code, which is data: no package of its own, whose name would hide NVIDIA's
        *find_packages("bench", include=["saap_lab*"]),
    ],
    package_dir={"saap_lab": "bench/saap_lab", "saap_index.cuda": "cuda"},
    ext_modules=[
        Extension(
            "saap_index._cpu",
            sorted(glob("bindings/*.cpp")),
            depends=[*glob("bindings/*.h"), "cuda/softmax_state.cuh"],
            include_dirs=[nanobind.include_dir()],
            define_macros=[
                ("Py_LIMITED_API", "0x030A0000"),
                ("NB_BACKEND_MODULE", "nanobind_backend"),
                ("NB_BACKEND_PYPI", "nanobind-backend"),
            ],
            # -Wno-psabi: vectors wider than the baseline's never cross a function that is not inlined.
            extra_compile_args=["-std=c++20", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", "-Wno-psabi"],
            language="c++",
            py_limited_api=True,
            # Without a compiler the package still installs, and says at run time what it lacks; whoever develops or packages
            # it sets the variable, and a failed build fails.
            optional=not os.environ.get("SAAP_REQUIRE_NATIVE"),
        )
    ]
)
