"""Builds the compiled kernels, which pyproject.toml cannot describe in a stable way.

On a machine without a compiler or without OpenMP the package is installed without them.
"""

from setuptools import Extension, setup

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
            depends=["normfree/native/share.h"],
            # -ffp-contract=off keeps the promise of share.h; the two flags before it let conditional loops vectorize
            extra_compile_args=[
                "-O3",
                "-funroll-loops",
                "-fno-trapping-math",
                "-fno-math-errno",
                "-ffp-contract=off",
                "-fopenmp",
            ],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
