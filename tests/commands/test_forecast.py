# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from endotrl import EndogenousReward
from endotrl.commands.main import main
from endotrl.forecasting.sampling import MixtureSampler

from ..evaluation.rows import write


PROMPTS = [[{"role": "user", "content": text}] for text in ("a", "a b c d e", "f g")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"prompt": row, "answer": "b"} for row in [*PROMPTS, PROMPTS[0]]]
    return write(tmp_path_factory.mktemp("data") / "questions.jsonl", rows)


class TestCommand:
    options = ("--max-new-tokens", "4", "--grader", "text", "--samples", "8", "--betas", "2", "0.5", "--device", "cpu")

    def test_files_and_resuming(self, tiny_policy_path, data, tmp_path, capsys, monkeypatch):
        command = ["forecast", "--model", tiny_policy_path, "--data", data, *self.options, "--output", "o"]
        assert main([*command, "--trainer", "rloo"]) == 0
        shown = capsys.readouterr().out
        result = json.loads((tmp_path / "o" / "forecast.json").read_text())
        assert shown.split()[:3] == result["verdict"].split()[:3]
        assert "4 questions (3 distinct)" in " ".join(shown.split())
        assert [row["beta"] for row in result["betas"]] == [2.0, 0.5]
        assert set(result["alternatives"]) >= {"sampled", "greedy", "temperature=0.5", "majority", "best_of_n"}
        assert all(len(row["accuracy_interval"]) == 2 and row["ess"] >= 1 for row in result["betas"])
        page = (tmp_path / "o" / "report.html").read_text()
        assert "2605.04542" in page and "2601.21590" in page
        assert page.index("these questions alone") < page.index("<img")
        # A line is lost, as by a kill: it is made again, and nothing else.
        log = tmp_path / "o" / "answers.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
        calls = []
        own = MixtureSampler.__call__
        monkeypatch.setattr(MixtureSampler, "__call__", lambda *a: calls.append(len(a[1])) or own(*a))
        assert main([*command, "--trainer", "grpo", "--suggest-beta"]) == 0
        assert calls == [1]
        assert capsys.readouterr().out in ("none\n", "2\n", "0.5\n")
        assert main([*command, "--seed", "7"]) == 2
        assert "--seed was 0 and is 7" in capsys.readouterr().err

    def test_other_rewards_and_power_sampling(self, tiny_policy_path, data, tmp_path, capsys):
        command = ["forecast", "--model", tiny_policy_path, "--data", data, *self.options, "--quiet"]
        assert main([*command, "--output", str(tmp_path / "a"), "--power-sampling", "1"]) == 0
        assert main([*command, "--output", str(tmp_path / "b"), "--aggregate", "mean", "--alpha", "0.5"]) == 0
        assert "power_sampling" in json.loads((tmp_path / "a" / "forecast.json").read_text())["alternatives"]
        record = json.loads((tmp_path / "b" / "answers.jsonl").read_text().splitlines()[0])
        reward = EndogenousReward(tiny_policy_path, aggregate="mean", alpha=0.5)
        expected = reward(
            prompts=[PROMPTS[0]] * 9,
            completions=[[{"role": "assistant", "content": text}] for text in record["texts"]],
            completion_ids=record["token_ids"],
        )
        assert record["rewards"] == pytest.approx(expected, abs=1e-4)
        assert main([*command, "--output", str(tmp_path / "c"), "--truncation", "skip"]) == 2
        assert "A forecast needs a reward for every completion" in capsys.readouterr().err

    def test_vllm(self, tiny_model_path, data, tmp_path, fake_vllm):
        command = ["forecast", "--model", tiny_model_path, "--data", data, *self.options, "--quiet"]
        assert main([*command, "--output", str(tmp_path / "v"), "--backend", "vllm"]) == 0
        # One temperature after another; the tokens that it says are scored by the model.
        asked = [(call[0].n, call[0].temperature) for call in fake_vllm.asked]
        assert asked == [(4, 1.0), (2, 0.7), (2, 0.5), (1, 0.0)]
        seeds = [row.seed for call in fake_vllm.asked for row in call]
        assert len(set(seeds)) == len(seeds) > 4  # no two questions or temperatures have the same noise
        record = json.loads((tmp_path / "v" / "answers.jsonl").read_text().splitlines()[1])
        (expected,) = EndogenousReward(tiny_model_path)(
            prompts=[PROMPTS[1]],
            completions=[[{"role": "assistant", "content": record["texts"][0]}]],
            completion_ids=[[34, 35]],
        )
        assert record["rewards"] == pytest.approx([expected] * 9, abs=1e-4)
