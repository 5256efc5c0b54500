"""Maps the source tree to packages: ``python/`` and ``kernels/`` (as ``sglang_ares_kernels``)."""

from __future__ import annotations

from setuptools import find_packages, setup

KERNELS = "sglang_ares_kernels"

setup(
    package_dir={"": "python", KERNELS: "kernels"},
    packages=[
        *find_packages("python", include=["sglang_ares", "sglang_ares.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
    ],
    py_modules=["sglang_ares_torch_autoload"],
    package_data={
        "sglang_ares": ["py.typed", "**/*.json", "**/*.jinja", "**/*.safetensors", "**/*.npz"],
        KERNELS: ["py.typed", "**/*.json"],
    },
    include_package_data=False,
)
