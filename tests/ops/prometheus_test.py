"""Rules and dashboard against a real Prometheus that scrapes a live server under load: every panel
has data, every rule evaluates, every alert has something to look at and none fires; and promtool's
own tests of when they fire. Run by `make ops-test`; needs prometheus and promtool."""

import html
import json
import math
import os
import pathlib
import re
import subprocess
import time
import urllib.error
import urllib.parse

import pytest

from live_server import LIMIT_S, ROOT, LiveServer, fetch, free_port

RULES = ROOT / "deploy" / "prometheus" / "kvservice.rules.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "kvservice.dashboard.json"

CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: kvservice
    static_configs: [{{targets: ["{target}"]}}]
"""


class Setup(LiveServer):
    """A server, and a Prometheus that scrapes it."""

    def __init__(self, folder):
        super().__init__(folder)
        self.prometheus = f"127.0.0.1:{free_port()}"
        config = folder / "prometheus.yml"
        config.write_text(CONFIG.format(rules=RULES, target=self.metrics))
        self.start("prometheus", [
            "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/tsdb",
            f"--web.listen-address={self.prometheus}", "--log.level=warn"])

    def query(self, expression):
        """Values of an instant query, without those that are no numbers."""
        arguments = urllib.parse.urlencode({"query": expression})
        reply = json.loads(fetch(f"http://{self.prometheus}/api/v1/query?{arguments}"))
        assert reply["status"] == "success", reply
        values = [float(series["value"][1]) for series in reply["data"]["result"]]
        return [value for value in values if math.isfinite(value)]

    def rules(self):
        reply = json.loads(fetch(f"http://{self.prometheus}/api/v1/rules"))
        return [rule for group in reply["data"]["groups"] for rule in group["rules"]]

    def load_until(self, expressions):
        """Loads until all of them have values; returns those that have none in the end."""
        return self.missing_after(expressions, self.load)

    def missing_after(self, expressions, load=lambda: None):
        missing = list(expressions)
        end = time.monotonic() + LIMIT_S
        while missing and time.monotonic() < end:
            load()
            try:
                missing = [expression for expression in missing if not self.query(expression)]
            except urllib.error.URLError:
                continue  # Prometheus is not up yet.
        return missing


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    running = Setup(tmp_path_factory.mktemp("ops"))
    yield running
    running.stop()


def panel_expressions():
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"].replace("$instance", ".*").replace("$__rate_interval", "1m")


def alert_expressions():
    """What every alert compares, from the text Prometheus gives back."""
    text = RULES.read_text()
    names = re.findall(r"- alert: (\w+)", text)
    assert len(names) == len(set(names)) > 10
    return names


def test_every_panel_has_data(setup):
    expressions = list(panel_expressions())
    assert len(expressions) > 30
    assert setup.load_until(expressions) == []


def test_every_panel_has_data_after_the_demo(tmp_path):
    demo = [str(ROOT / "build" / "venv" / "bin" / "python"), "-m", "kvservice_demo",
            "--policy", "certified", "--policy", "cpe", "--tokens", "16"]
    paths = [str(ROOT / "client" / "python"), str(ROOT / "build" / "python")]
    setup = Setup(tmp_path)
    try:
        outcome = subprocess.run([*demo, "--endpoint", setup.endpoint], capture_output=True,
                                 text=True, check=False,
                                 env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        # Nothing else has called: what is missing now stays so.
        assert setup.missing_after(panel_expressions()) == []
    finally:
        setup.stop()


def numbers_on_page(page):
    """Expression and value of each number that is not one of the last seconds, nor of the process
    alone (those change between any two looks)."""
    found = re.findall(r'<data value="([^"]*)" title="([^"]*)">', page)
    numbers = {html.unescape(title): float(value) for value, title in found}
    return {expression: value for expression, value in numbers.items()
            if "rate(" not in expression and "sum(process_" not in expression
            and "uptime" not in expression}


def test_the_status_page_says_what_prometheus_computes(setup):
    assert setup.load_until(["kvservice_audit_certificates_total"]) == []
    end = time.monotonic() + LIMIT_S
    different = {"nothing was compared": ()}
    while different and time.monotonic() < end:
        # Audits may still run, and scrapes are a second apart.
        numbers = numbers_on_page(fetch(f"http://{setup.metrics}/status"))
        different = {expression: (value, setup.query(expression))
                     for expression, value in numbers.items()
                     if setup.query(expression) != [pytest.approx(value, rel=1e-12)]}
    assert different == {}
    assert len(numbers) > 80
    assert sum("histogram_quantile" in expression for expression in numbers) > 10


def test_every_rule_evaluates_and_no_alert_fires(setup):
    assert setup.load_until(["kvservice:attend_seconds:p99_rate5m",
                             "kvservice:attend_tokens_read:ratio_rate5m",
                             "kvservice:engine_calls_shed:ratio_rate5m"]) == []
    rules = setup.rules()
    alerts = {rule["name"]: rule for rule in rules if rule["type"] == "alerting"}
    assert sorted(alerts) == sorted(alert_expressions())
    for rule in rules:
        assert rule["health"] == "ok", rule
    for name, rule in alerts.items():
        assert rule["state"] == "inactive", name
        left, _, _ = re.split(r" ([<>]) (?!.* [<>] )", rule["query"], maxsplit=1)
        # Without a disk error a disk tier still has a limit, and so on: something is compared.
        assert setup.query(left), f"{name}: {left} has no data"


def test_scrapes_are_what_prometheus_likes(setup):
    page = fetch(f"http://{setup.metrics}/metrics")
    lint = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True,
                          text=True, check=False)
    assert lint.returncode == 0, lint.stdout + lint.stderr


def test_slow_calls_are_logged_with_their_stages_and_not_too_often(setup):
    # With random keys and a certified policy hardly any call takes less than the limit.
    lines = re.findall(r"\[warning\] (slow call=.*)", (setup.folder / "server.log").read_text())
    assert lines and len(lines) < 10 * LIMIT_S * 3
    for line in lines:
        assert re.fullmatch(r"slow call=\d+ layer=\d+ rows=1 queue_us=\d+ service_us=\d+", line)


def test_alerts_fire_where_they_should():
    for command in (["check", "rules", str(RULES)],
                    ["test", "rules", str(RULES).replace(".rules.yml", ".rules_test.yml")]):
        outcome = subprocess.run(["promtool", *command], capture_output=True, text=True,
                                 check=False)
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    cases = RULES.with_name("kvservice.rules_test.yml").read_text()
    for name in alert_expressions():
        assert f"{name} fires" in cases and f"{name} is quiet" in cases
