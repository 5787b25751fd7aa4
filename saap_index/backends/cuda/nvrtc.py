"""NVRTC by itself, from NVIDIA's wheel: kernels compile, and their registers are known, without a GPU, a driver or a toolkit.

For tests and for whoever tunes kernels; an index compiles through CuPy (`gpu_runtime`). Knows compilers, not kernels.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import MissingDependencyError
from . import source as gpu_source

FLAGS = ("-std=c++17", "-ftz=true", "--device-as-default-execution-space")
"""What CuPy gives its kernels too."""

_USED = re.compile(
    r"(?:Function properties for|Compiling entry function) '?(\w+)'?.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel: registers of a thread; bytes of a thread's stack; bytes spilled, stores and loads."""

    registers: int
    stack_bytes: int
    spill_bytes: int


@functools.cache
def library() -> ctypes.CDLL:
    """The NVRTC library of the wheel nvidia-cuda-nvrtc. Raises MissingDependencyError."""
    for wheel in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        try:
            files = importlib.metadata.files(wheel) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        names = {file.name: str(file.locate()) for file in files}
        for builtins in (x for x in names if re.fullmatch(r"libnvrtc-builtins\.so\.[\d.]+", x)):
            ctypes.CDLL(names[builtins])  # NVRTC asks for it by its bare name, which finds what is loaded already
        for main in (x for x in names if re.fullmatch(r"libnvrtc\.so\.\d+", x)):
            return ctypes.CDLL(names[main])
    raise MissingDependencyError("compiling kernels without a GPU needs NVRTC: pip install 'nvidia-cuda-nvrtc==13.0.*'")


def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def compile_kernel(
    file: str, macros: Mapping[str, int], arch: str, flags: Sequence[str] = FLAGS
) -> tuple[bytes, dict[str, Usage]]:
    """``cuda/<file>`` for ``arch`` (such as "sm_90"): the cubin, and what each of its kernels uses.

    Raises RuntimeError with the compiler's log.
    """
    nvrtc = library()
    program = ctypes.c_void_p()
    text = gpu_source.source(file).encode()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, file.encode(), 0, None, None))
    try:
        options = [f"-arch={arch}", *flags, "--ptxas-options=-v", *gpu_source.options(macros)]
        packed = (ctypes.c_char_p * len(options))(*(x.encode() for x in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), packed)
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode().rstrip("\0")
        if failed:
            raise RuntimeError(f"{file} {dict(macros)} for {arch}:\n{log}")
        cubin = _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin, usage(log)


def usage(log: str) -> dict[str, Usage]:
    """Registers, stack and spills by kernel, out of what ptxas -v prints."""
    usage = {}
    for part in re.split(r"(?=Compiling entry function)", log):
        match = _USED.search(part)
        if match:
            stack, stores, loads, registers = (int(x) for x in match.groups()[1:])
            usage[match.group(1)] = Usage(registers, stack, stores + loads)
    return usage


def _read(size_of, read, program) -> bytes:  # type: ignore[no-untyped-def]
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(read(program, buffer))
    return buffer.raw


def _check(code: int) -> None:
    if code:
        text = library().nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {text(code).decode()}")
