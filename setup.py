"""Builds the optional native library of kernels/cpu/. Everything else about the package is in pyproject.toml.

Each instruction set is one C file with flags of its own; the library picks one when it starts. What the compiler does
not know is left out, and without any compiler the package installs all the same: kernels/ then runs plain torch.

OCTAVO_NATIVE_CFLAGS is added to every compilation and to linking, for builds with sanitizers:

    OCTAVO_NATIVE_CFLAGS="-fsanitize=address,undefined -g" python setup.py build_ext --build-lib build/sanitized --force
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = Path("kernels/cpu/native")
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mprfchw"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "bf16")), "-mprefer-vector-width=512"]
ISA_FLAGS = {
    "avx2": AVX2,
    "avxvnni": [*AVX2, "-mavxvnni"],
    "avx512": AVX512,
    "amx": [*AVX512, "-mamx-tile", "-mamx-bf16"],
}
# NaN and the order of sums matter, so nothing of -ffast-math; products are fused where the code says so.
FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-Wall", "-g0"]


class BuildNative(build_ext):
    """Compiles the isa_*.c one by one, and tells run.c which of them worked."""

    def build_extension(self, ext: Extension) -> None:
        extra = shlex.split(os.environ.get("OCTAVO_NATIVE_CFLAGS", ""))
        objects, macros = [], []
        for isa, flags in ISA_FLAGS.items():
            try:
                objects += self._compile([str(NATIVE / f"isa_{isa}.c")], [*FLAGS, *flags, *extra])
                macros.append((f"OV_HAVE_{isa.upper()}", "1"))
            except CompileError as error:
                self.warn(f"built without {isa}: {error}")
        if not macros:
            raise CompileError("no instruction set could be compiled")
        ext.define_macros, ext.extra_compile_args = macros, [*FLAGS, *extra]
        ext.extra_objects, ext.extra_link_args = objects, ["-pthread", *extra]
        super().build_extension(ext)

    def _compile(self, sources: list[str], flags: list[str]) -> list[str]:
        headers = [str(path) for path in sorted(NATIVE.glob("*.h"))]
        return self.compiler.compile(sources, output_dir=self.build_temp, extra_postargs=flags, depends=headers)


def native_extensions() -> list[Extension]:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64") or sys.maxsize < 2**32:
        return []
    common = [str(path) for path in sorted(NATIVE.glob("*.c")) if not path.name.startswith("isa_")]
    headers = [str(path) for path in sorted(NATIVE.glob("*.h"))]
    return [Extension("octavo.kernels.cpu._native", common, depends=headers, optional=True)]


setup(ext_modules=native_extensions(), cmdclass={"build_ext": BuildNative})
