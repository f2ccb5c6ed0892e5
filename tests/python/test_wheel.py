"""The wheel: built, installed where nothing else is, and used against a server."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from kvservice_demo.server import OwnServer

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
import numpy as np
import kvservice
from kvservice.v1 import model_pb2, types_pb2

assert "client/python" not in kvservice.__file__, kvservice.__file__
with kvservice.Client(sys.argv[1], transport="lane") as client:
    client.register_model(model_pb2.Model(
        name="m", layer_count=1, query_head_count=2, kv_head_count=1, head_dim=64, scale=1.0,
        cache_dtype=types_pb2.DATA_TYPE_FLOAT32))
    with client.sequence("m", policy=kvservice.make_policy("dense")) as sequence:
        token = np.ones((1, 1, 1, 64), np.float32)
        sequence.append(0, token, token)
        out = sequence.attend(0, np.ones((2, 64), np.float32), position=0).out
print(out.sum())
"""


@pytest.fixture(scope="module")
def wheel():
    subprocess.run(["make", "-s", "-C", str(ROOT), "wheel"], check=True)
    (path,) = (ROOT / "build" / "wheel").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """An environment with the wheel; what it depends on is that of this one."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    yield python
    shutil.rmtree(folder)


def test_it_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    source = ROOT / "client" / "python" / "kvservice"
    expected = {f"kvservice/{path.relative_to(source)}" for path in source.rglob("*.py*")
                if path.suffix in (".py", ".typed")}
    for path in (ROOT / "proto" / "kvservice" / "v1").glob("*.proto"):
        expected |= {f"kvservice/v1/{path.stem}_pb2.py", f"kvservice/v1/{path.stem}_pb2.pyi"}
    assert {name for name in names if ".dist-info/" not in name} == expected | {
        "kvservice/py.typed"
    }


def test_it_works_where_it_is_installed(fresh, tmp_path):
    with OwnServer() as server:
        # -P: the working folder is not on the path.
        done = subprocess.run(
            [fresh, "-P", "-c", PROGRAM, server.endpoint], cwd=tmp_path, capture_output=True,
            text=True, env={},
        )
    assert (done.returncode, done.stdout) == (0, "128.0\n"), done.stderr


def test_its_dependencies_are_those_of_the_tests(fresh):
    code = "import importlib.metadata as m; print(*m.requires('kvservice'), sep='\\n')"
    done = subprocess.run([fresh, "-c", code], capture_output=True, text=True, check=True)
    wanted = done.stdout
    names = {re.match(r"[\w-]+", line)[0] for line in wanted.splitlines() if "extra" not in line}
    assert names == {"grpcio", "numpy", "protobuf"}
    for name in names:
        assert importlib.metadata.version(name)
