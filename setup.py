"""Where the packages lie; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# kernels/ stands at the top of the repository, beside csrc/, and installs inside the package:
# a top-level package called "kernels" would shadow the one of that name on PyPI.
kernels = ["gradroute.kernels"] + [f"gradroute.kernels.{name}" for name in find_packages("kernels")]

setup(
    packages=find_packages(include=["gradroute", "gradroute.*"]) + kernels,
    package_dir={"gradroute.kernels": "kernels"},
)
