"""Builds the messages into the wheel; everything else is in pyproject.toml."""

import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDER = Path(__file__).resolve().parent
PROTO = FOLDER.parents[1] / "proto"


class BuildWithMessages(build_py):
    """Copies the package, then generates kvservice/v1 beside it."""

    def find_package_modules(self, package, package_dir):
        if package == "kvservice.v1":
            return []
        return super().find_package_modules(package, package_dir)

    def check_package(self, package, package_dir):
        if package == "kvservice.v1":
            return None
        return super().check_package(package, package_dir)

    def run(self):
        super().run()
        protoc = shutil.which("protoc")
        if protoc is None:
            raise RuntimeError("protoc is not on the path: install protobuf-compiler")
        files = sorted(PROTO.glob("kvservice/v1/*.proto"))
        if not files:
            raise RuntimeError(f"no messages in {PROTO}: the wheel is built in a checkout")
        command = [protoc, f"--proto_path={PROTO}", f"--python_out={self.build_lib}"]
        subprocess.run([*command, f"--pyi_out={self.build_lib}", *map(str, files)], check=True)


# Nothing is written into the source tree.
BUILD = FOLDER.parents[1] / "build" / "wheel"
BUILD.mkdir(parents=True, exist_ok=True)
setup(
    cmdclass={"build_py": BuildWithMessages},
    options={"build": {"build_base": str(BUILD)}, "egg_info": {"egg_base": str(BUILD)}},
)
