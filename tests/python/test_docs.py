"""Documents that follow from something else are up to date, and what they show works."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ["KVSERVICE_BIN_DIR"])
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_api_reference_is_what_the_protos_say():
    checked = subprocess.run([sys.executable, str(ROOT / "proto" / "reference.py"), "--check"],
                             capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def headings(path):
    """Anchors as they are made of headings."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-")
            for line in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path) if path else document
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


def test_the_policy_guides_example_is_a_policy_file(tmp_path):
    example = re.search(r"```json\n(.*?)```", (ROOT / "docs" / "policies.md").read_text(),
                        flags=re.DOTALL).group(1)
    names = [policy["name"] for policy in json.loads(example)]
    file = tmp_path / "policies.json"
    file.write_text(example)
    checked = subprocess.run([str(BIN / "kvservice"), "--policy-file", str(file), "--check-config"],
                             capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert names == ["chat", "fast"]


def test_the_packages_configuration_is_one():
    checked = subprocess.run(
        [str(BIN / "kvservice"), "--config", str(ROOT / "deploy" / "debian" / "kvservice.conf"),
         "--check-config"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_every_alert_is_in_the_operations_guide():
    rules = (ROOT / "deploy" / "prometheus" / "kvservice.rules.yml").read_text()
    guide = (ROOT / "docs" / "operations.md").read_text()
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert alerts
    assert [alert for alert in alerts if alert not in guide] == []


def test_every_command_of_kvctl_is_in_its_document():
    document = (ROOT / "docs" / "kvctl.md").read_text()
    words = subprocess.run([str(BIN / "kvctl"), "__complete", ""], capture_output=True, text=True,
                           check=True).stdout.split()
    assert "sequence" in words
    for noun in words:
        verbs = subprocess.run([str(BIN / "kvctl"), "__complete", noun, ""], capture_output=True,
                               text=True, check=True).stdout.split()
        assert f"`{noun}" in document, noun
        for verb in verbs if noun in ("server", "sequence", "block", "model") else []:
            assert re.search(rf"`[^`]*\b{verb}\b[^`]*`", document), f"{noun} {verb}"
