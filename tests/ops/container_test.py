"""The container file by hadolint, and against the chart that runs its image. Run by
`make ops-test`.
No image is built here: its package is built, installed and run by `make deb-test`."""

import pathlib
import re
import subprocess
import sys

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONTAINERFILE = ROOT / "deploy" / "container" / "Containerfile"
CHART = ROOT / "deploy" / "helm" / "kvservice"


def lint(text):
    hadolint = pathlib.Path(sys.executable).with_name("hadolint")
    outcome = subprocess.run([str(hadolint), "--no-color", "-"], input=text, capture_output=True,
                             text=True, check=False)
    return outcome.returncode, outcome.stdout + outcome.stderr


def test_lint_finds_nothing():
    assert lint(CONTAINERFILE.read_text()) == (0, "")


def test_lint_finds_what_is_wrong():
    status, said = lint("FROM debian:latest\nRUN cd /tmp && sudo make\n")
    assert status != 0 and "DL3007" in said and "DL3004" in said


def test_what_this_machine_built_stays_out_of_the_image():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {"build", ".git"} <= set(ignored)
    # What the first stage leaves is what the second takes.
    text = CONTAINERFILE.read_text()
    assert "RUN make deb\n" in text
    assert "\nCOPY --from=build /source/build/deb/kvservice_*.deb " in text


def test_the_chart_runs_it_as_its_user():
    user, group = re.search(r"^USER (\d+):(\d+)$", CONTAINERFILE.read_text(),
                            re.MULTILINE).groups()
    chart = (CHART / "templates" / "statefulset.yaml").read_text()
    assert f"runAsUser: {user}\n" in chart
    assert str(yaml.safe_load((CHART / "values.yaml").read_text())["fsGroup"]) == group
    port = re.search(r"^EXPOSE (\d+)$", CONTAINERFILE.read_text(), re.MULTILINE).group(1)
    assert f"{{name: metrics, containerPort: {port}}}" in chart
