# SPDX-License-Identifier: Apache-2.0
"""W&B: the sections of its workspace, alerts, and evaluations as runs."""

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from endotrl import CollapseMonitor
from endotrl.commands.main import main
from endotrl.launch.callbacks import Tracking
from endotrl.launch.pipeline import print_summary
from endotrl.runs.wandb_run import check_wandb, log_evaluation
from endotrl.runs.wandb_workspace import LAYOUT, make_workspace

from ..launch.test_recipes_tracking import PANELS, read_offline_run, records


class FakeRun:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.alerts: list[tuple[str, str]] = []
        self.metrics: dict[str, dict[str, str]] = {}
        self.logged: dict[str, Any] = {}
        self.config = SimpleNamespace(update=lambda *args, **kwargs: None)

    def alert(self, title: str, text: str, level: str) -> None:
        assert level in ("INFO", "WARN", "ERROR")
        self.alerts.append((title, text))

    def define_metric(self, name: str, **settings: str) -> None:
        self.metrics[name] = settings

    def log(self, values: dict[str, Any]) -> None:
        self.logged.update(values)


@pytest.fixture
def run(monkeypatch):
    """The run that this process has at W&B."""
    wandb = pytest.importorskip("wandb")
    fake = FakeRun()
    monkeypatch.setattr(wandb, "run", fake)
    return fake


def panels_of(metric: str) -> list[str]:
    return [title for part in LAYOUT.values() for title, regex in part.items() if re.fullmatch(regex, metric)]


class TestWorkspace:
    def test_every_curve_of_a_run_has_a_panel(self):
        names = ("change", "change_error", "agreement", "agreement_z", "slope")
        logged = PANELS | {"ppo/kl_reward", "ppo/explained_variance", "accuracy", "margin"}
        logged |= {"advantage/within_completion", *(f"collapse/{name}/accuracy" for name in names)}
        assert {metric for metric in logged if not panels_of(metric)} == set()
        for metric in ("rewards/accuracy/mean", "collapse/held_out/accuracy"):
            assert panels_of(metric)[0] == "Held-out accuracy"
        assert panels_of("collapse/held_out_error/accuracy") == ["Standard errors"]
        # W&B's server reads them: RE2 does not look ahead or back.
        assert not any("(?" in regex for part in LAYOUT.values() for regex in part.values())

    def test_as_wandb_has_it(self):
        pytest.importorskip("wandb_workspaces")
        spec = json.loads(make_workspace("me", "mine")._to_model().spec.model_dump_json(by_alias=True))
        sections = spec["section"]["panelBankConfig"]["sections"]
        assert [section["name"] for section in sections][: len(LAYOUT)] == list(LAYOUT)
        panel = sections[0]["panels"][0]["config"]
        assert panel["chartTitle"] == "Held-out accuracy" and panel["useMetricRegex"]
        assert re.match(panel["metricRegex"], "eval/rewards/accuracy/mean")

    def test_whose_project(self, capsys):
        assert main(["workspace", "mine"]) == 2
        assert "must be ENTITY/PROJECT, got 'mine'" in capsys.readouterr().err


def test_alert_on_collapse(run):
    monitor = CollapseMonitor(held_out=["accuracy"])
    args = SimpleNamespace(report_to=["wandb"], output_dir="x", load_best_model_at_end=False)
    state = SimpleNamespace(log_history=[{}], is_world_process_zero=True, global_step=0, stateful_callbacks={})
    control = SimpleNamespace(should_training_stop=False)
    noise = [0.01, -0.01] * 50
    accuracies = [0.7 + e for e in noise[:40]] + [0.7 - 0.01 * i + e for i, e in enumerate(noise[:30])]
    for step, accuracy in enumerate(accuracies):
        state.global_step = step
        monitor.on_log(args, state, control, logs={"reward": 0.1 * step, "rewards/accuracy/mean": accuracy})
    ((title, text),) = run.alerts  # once
    assert title == "Collapse detected" and text.startswith(f"Step {monitor.alarms[0][0]}. The held-out reward")
    assert monitor.alarms[0][0] >= 40


def test_summary_has_accuracy_first(run):
    history = [
        {"reward": float(i), "kl": 0.1, "rewards/endogenous_reward/mean": float(i), "rewards/accuracy/mean": i / 10}
        for i in range(10)
    ]
    history += [{"eval_reward": 0.0, "eval_rewards/accuracy/mean": value} for value in (0.25, 0.75)]
    print_summary(history, "output")
    table = run.logged["summary"]
    assert table.columns == ["metric", "start", "end"]
    found = {row[0]: row[1:] for row in table.data}
    assert [*found][:3] == ["rewards/accuracy/mean", "eval_rewards/accuracy/mean", "kl"] and len(found) == 4
    # Ten steps: the first and the last two.
    assert found["rewards/accuracy/mean"] == pytest.approx([0.05, 0.85])
    assert found["eval_rewards/accuracy/mean"] == [0.25, 0.75]


def test_best_values_are_kept(run):
    args = SimpleNamespace(report_to=["wandb"], device=torch.device("cpu"))
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    Tracking({}).on_log(args, state, logs={"loss": 0.1})
    assert run.metrics["eval/rewards/*"] == {"step_metric": "train/global_step", "summary": "last,max"}


def test_evaluation(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # the environment is read once
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    page = tmp_path / "report.html"
    page.write_text("<html>&lt;b&gt;</html>")
    results = {
        **{key: key for key in ("benchmark", "model", "model_version", "data", "settings", "versions", "verdict")},
        "settings": {"alpha": 1.0},
        "main_metric": "accuracy",
        "metrics": {"bellman.sum": {"accuracy": {"value": 0.7}}, "length": {"accuracy": {"value": None}}},
    }
    log_evaluation("mine", results, (["scorer", "accuracy"], [["bellman.sum", 0.7], ["length", None]]), [page])
    wandb.teardown()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    summary: dict[tuple[str, ...], Any] = {}
    for data in records(file):
        for item in wandb_internal_pb2.Record.FromString(data).summary.update:
            summary[tuple(item.nested_key) or (item.key,)] = json.loads(item.value_json)
    assert summary["bellman.sum/accuracy",] == 0.7 and summary["verdict",] == "verdict"
    kinds = {key[0]: value for key, value in summary.items() if key[-1] == "_type"}
    assert kinds["results"] == "table-file" and kinds["report"] == "html-file"
    assert read_offline_run(file)[0] >= {"results", "report"}


def test_evaluation_without_the_package(monkeypatch):
    monkeypatch.setattr("endotrl.runs.wandb_run.find_spec", lambda name: None)
    check_wandb(None)
    with pytest.raises(ImportError, match=r"pip install 'endotrl\[wandb\]'"):
        check_wandb("mine")
