# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from endotrl.commands.main import main

from ..monitoring.diagnosis.runs import changed, healthy, write_state


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, str]:
    logs = {
        "good": healthy(),
        "short": healthy()[:5],
        "clipped": changed(clipped=0.6),
        "frozen": changed(grad_norm=0.0, **{"rewards/<script>alert(1)</script>/mean": 0.0}),
    }
    return {name: str(write_state(tmp_path / name / "trainer_state.json", rows).parent) for name, rows in logs.items()}


@pytest.mark.parametrize(
    ("name", "codes"), [("good", (0, 0, 0)), ("short", (0, 1, 0)), ("clipped", (0, 1, 0)), ("frozen", (0, 1, 1))]
)
def test_exit_codes(name: str, codes: tuple[int, ...], runs: dict[str, str]) -> None:
    found = [
        main(["diagnose", runs[name], *fail]) for fail in ([], ["--fail-on", "warning"], ["--fail-on", "failure"])
    ]
    assert tuple(found) == codes
    assert main(["diagnose", runs["good"], runs[name], "--fail-on", "warning"]) == codes[1]


def test_output(runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", runs["frozen"], "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Failing: The gradient is zero: no parameter is trained")
    assert "grad_norm" in out and "is_trainable=True" in out and "▁▁▁" in out
    assert max(len(line) for line in out.splitlines() if "trainer_state" not in line and "Report" not in line) <= 80
    findings = json.loads((tmp_path / "out" / "findings.json").read_text())["runs"]
    assert [run["status"] for run in findings] == ["failure"]
    assert findings[0]["findings"][0]["name"] == "zero_gradient" and findings[0]["log_entries"] == 60
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<polyline" in page and "The gradient is zero" in page and "<script" not in page


def test_two_runs(runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", runs["good"], runs["frozen"], "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "No problems found" in out and "Failing" in out and "First and last values" in out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Side by side" in page and page.count("<polyline") >= 8
