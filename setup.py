# SPDX-License-Identifier: MIT OR Apache-2.0
"""Packs the native files that bindings/build.py has put into the package."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithNativeFiles(build_py):
    def run(self):
        if not list((ROOT / "bindings/python/mlstm/_lib").glob("mlstm_*.so")):
            subprocess.run(["cargo", "build", "--release"], cwd=ROOT, check=True)
            subprocess.run([sys.executable, "bindings/build.py"], cwd=ROOT, check=True)
        super().run()


class Native(Distribution):
    def has_ext_modules(self):
        return True


class AnyPython(bdist_wheel):
    def get_tag(self):
        return "py3", "none", re.sub(r"[-.]", "_", sysconfig.get_platform())


setup(
    version=re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text(), re.M)[1],
    distclass=Native,
    cmdclass={"build_py": BuildWithNativeFiles, "bdist_wheel": AnyPython},
)
