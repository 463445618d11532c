"""Builds the compiled kernels, which pyproject.toml cannot describe in a stable way.

They are a plain shared library that uses nothing of Python, so one wheel serves all versions of Python (its tag is
abi3). On a machine without a compiler the package is installed without them; a release must have them.
"""

import os

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# By the kind of the compiler: "unix" is gcc or clang, "msvc" that of Visual Studio. No flag may depend on the processor
# of this machine, since wheels are used on others. -ffp-contract=off keeps the promise of share.h; the two flags before
# it let conditional loops vectorize.
FLAGS = {
    "unix": ["-O3", "-g0", "-funroll-loops", "-fno-trapping-math", "-fno-math-errno", "-ffp-contract=off"],
    "msvc": ["/O2", "/std:c11", "/fp:precise"],
}
LIBRARIES = {"unix": ["-ldl", "-lm"], "msvc": []}


class BuildKernels(build_ext):
    """Compiles with the flags of the compiler that was found, and exports no function for Python's `import`."""

    def build_extensions(self) -> None:
        for extension in self.extensions:
            extension.extra_compile_args = FLAGS.get(self.compiler.compiler_type, [])
            extension.extra_link_args = LIBRARIES.get(self.compiler.compiler_type, [])
        super().build_extensions()

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # the sources export what they define


setup(
    ext_modules=[
        Extension(
            name="normfree.native._compiled",
            sources=[
                "normfree/native/update.c",
                "normfree/native/standardize.c",
                "normfree/native/winograd.c",
                "normfree/native/activations.c",
            ],
            depends=["normfree/native/share.h", "normfree/native/parallel.h"],
            py_limited_api=True,
            optional="CIBUILDWHEEL" not in os.environ,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
