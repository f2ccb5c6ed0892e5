"""The Helm chart by Helm's own linter and engine, and what it renders by the server itself. Run by
`make ops-test`. No cluster is asked: that a kubelet accepts the objects is not shown here."""

import os
import pathlib
import subprocess

import pytest
import yaml
from helm_python import Chart, lint

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("KVSERVICE_BIN_DIR", ROOT / "build" / "bin"))
CHART = ROOT / "deploy" / "helm" / "kvservice"
POLICIES = '[{"name": "chat", "policy": {"selector": "SELECTOR_CERTIFIED"}}]'
EVERYTHING = {
    "replicas": 3, "policies": POLICIES, "serviceMonitor": {"enabled": True},
    "persistence": {"size": "1Ti", "storageClass": "fast"}, "socketHostPath": "",
    "nodeSelector": {"disk": "nvme"}, "tolerations": [{"operator": "Exists"}],
    "affinity": {"nodeAffinity": {}}, "podAnnotations": {"a": "b"},
    "networkPolicy": {"enabled": False}, "image": {"repository": "example/kvservice", "tag": "1"},
}


def render(values):
    """Objects by their kind."""
    with Chart.load(CHART) as chart:
        manifests = chart.render(values, name="kv", namespace="models")
    documents = [document for path, text in manifests.items() if path.endswith(".yaml")
                 for document in yaml.safe_load_all(text) if document]
    by_kind = {document["kind"]: document for document in documents}
    assert len(by_kind) == len(documents), "one of each"
    return by_kind


@pytest.mark.parametrize("values", [{}, EVERYTHING])
def test_lint_finds_nothing(values):
    report = lint(CHART, values, strict=True, kube_version="v1.29.0")
    wrong = [message for message in report["messages"] if message["severity"] >= 2]
    assert (wrong, report["errors"]) == ([], [])
    assert report["total_charts_linted"] == 1


def test_kinds():
    always = {"ConfigMap", "PodDisruptionBudget", "Service", "StatefulSet"}
    assert set(render({})) == always | {"NetworkPolicy"}
    assert set(render(EVERYTHING)) == always | {"ServiceMonitor"}


@pytest.mark.parametrize("values", [{}, EVERYTHING])
def test_objects_belong_together(values):
    objects = render(values)
    pod = objects["StatefulSet"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    selectors = [objects["StatefulSet"]["spec"]["selector"]["matchLabels"],
                 objects["Service"]["spec"]["selector"],
                 objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]]
    if "NetworkPolicy" in objects:
        selectors.append(objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"])
    if "ServiceMonitor" in objects:
        selectors.append(objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"])
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert selector.items() <= objects["Service"]["metadata"]["labels"].items()
    server = pod["spec"]["containers"][0]
    ports = {port["name"] for port in server["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"]["port"] in ports
        assert server[probe]["httpGet"]["path"] in ("/readyz", "/livez")
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]} | {
        claim["metadata"]["name"]
        for claim in objects["StatefulSet"]["spec"]["volumeClaimTemplates"]}
    for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", []):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert server["securityContext"]["allowPrivilegeEscalation"] is False
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize("values", [{}, EVERYTHING])
def test_the_server_takes_the_configuration(values, tmp_path):
    files = render(values)["ConfigMap"]["data"]
    for name, text in files.items():
        (tmp_path / name).write_text(text.replace("/etc/kvservice", str(tmp_path)))
    checked = subprocess.run(
        [str(BIN / "kvservice"), "--config", str(tmp_path / "kvservice.conf"), "--check-config"],
        capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert ("policies.json" in files) == bool(values)
