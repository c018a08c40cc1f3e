"""What pyproject.toml cannot say: the configs of a checkout lie beside the package, in the installed package within it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["jaxcl*"]), "jaxcl.configs"],
    package_dir={"jaxcl.configs": "configs"},
)
