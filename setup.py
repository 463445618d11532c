"""The one thing that pyproject.toml cannot say in a way that lasts: loops for CPUs, in C.

A machine without a compiler, or without OpenMP, gets the package without them.
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
            # -ffp-contract=off is what share.h promises; the two before it let loops with a choice become vectors.
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
