# SPDX-License-Identifier: Apache-2.0
import json
import math
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from endotrl import EndogenousReward
from endotrl.data.formats import message_text
from endotrl.runs.record import model_digest
from endotrl.score_file import score_file
from endotrl.score_file.output_files import Tally
from endotrl.score_file.rows import OUTPUT_KEYS, TOKEN_KEYS, Row
from endotrl.score_file.sharded import ShardedScores

from ..support.rows import parse_row


SETTINGS = {"model": "tiny", "alpha": 1.0}


def text_row(i: int) -> dict:
    return {"prompt": f"{i} + {i} =", "completion": f" {2 * i}", "id": f"t{i}"}


def message_row(i: int) -> dict:
    return {
        "prompt": [{"role": "user", "content": f"Double {i}"}],
        "completion": [{"role": "assistant", "content": "word " * (i % 5) + str(2 * i)}],
        "source": {"set": ["a", i]},
    }


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    def reject(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=reject) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def scored(reward, rows, tmp_path, **options):
    """Report and output lines."""
    report = score_file(reward, write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", SETTINGS, **options)
    return report, read_rows(tmp_path / "out.jsonl")


@pytest.fixture(scope="module")
def reward(tiny_model_path):
    return EndogenousReward(tiny_model_path, dtype="float32", device="cpu")


class Interrupted(EndogenousReward):
    """Is interrupted at its n-th call."""

    def __init__(self, *args, at: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls, self.at = 0, at

    def score(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return super().score(*args, **kwargs)


class TestParseRow:
    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b'{"prompt": "a", "completion": ', "Not valid JSON: Expecting value"),
            (b"\xff\xfe", "Not UTF-8 text: 'utf-8' codec can't decode byte 0xff"),
            (b'{"prompt": "a", "completion": "b", "x": NaN}', "A number is NaN"),
            (b'{"prompt": "a", "completion": "b", "x": 1e999}', "A number is NaN, infinite or too large for a float"),
            (b"[" * 100_000, "nested too deeply"),
            (b'["a", "b"]', "A row must be a JSON object, got [\"a\", \"b\"]"),
            (b'{"prompt": "a"}', 'The key "completion" is missing'),
            (b'{"prompt": "a", "completion": 4}', "The completion must be text or a list of messages, got int"),
            (b'{"prompt": "", "completion": "b"}', "The prompt is empty"),
            (b'{"prompt": [], "completion": []}', "The prompt is an empty list of messages"),
            (b'{"prompt": [{"content": "a"}], "completion": "b"}', "Message 1 of the prompt must be an object"),
            (b'{"prompt": [{"role": "user", "content": 1}], "completion": "b"}', "The content of message 1 of the prompt must be text"),
            (b'{"prompt": "a", "completion": "b", "reward": 1}', 'The key "reward" is reserved for the output'),
            (b'{"prompt": "a", "completion": "\\ud800"}', "half of a surrogate pair"),
            (b'{"prompt": "a", "completion": "b", "completion_ids": "7"}', "must be a list of token ids, got str"),
            (b'{"prompt": "a", "completion": "b", "completion_ids": [7, true]}', "a whole number from 0, got true"),
            (b'{"prompt": "a", "completion": "b", "completion_ids": [7.0]}', "Entry 1 of the completion_ids must be a token id, a whole number from 0, got 7.0"),
        ],
    )  # fmt: skip
    def test_says_what_is_wrong(self, line, reason):
        assert reason in parse_row(3, line).error

    @pytest.mark.parametrize(
        ("line", "row"),
        [
            (b'{"id": 7, "prompt": "a", "completion": "", "x": [1, {"y": null}]}', Row(2, "a", "", {"id": 7, "x": [1, {"y": None}]})),
            (b'{"prompt": "a", "completion": "b", "completion_ids": [7, 0], "x": 1}', Row(2, "a", "b", {"x": 1}, completion_ids=[7, 0])),
            (b'{"prompt": "a", "completion": "", "completion_ids": []}', Row(2, "a", "", completion_ids=[])),
            # As a table writes a row without them.
            (b'{"prompt": "a", "completion": "b", "completion_ids": null}', Row(2, "a", "b")),
        ],
    )  # fmt: skip
    def test_keeps_other_keys_and_token_ids(self, line, row):
        assert parse_row(2, line) == row

    def test_an_invalid_row_keeps_its_id(self):
        assert parse_row(2, b'{"id": "seven", "prompt": 1, "x": 2}').extra == {"id": "seven"}

    def test_byte_order_mark_on_the_first_line_only(self):
        line = b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}'
        assert parse_row(1, line).error is None
        assert "Not valid JSON" in parse_row(2, line).error

    def test_text_of_messages(self):
        calls = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
        row = {"prompt": [{"role": "user", "content": "a"}], "completion": calls}
        assert parse_row(1, json.dumps(row).encode()).error is None
        assert message_text(calls) == '[{"function": {"name": "f"}}]'
        parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
        assert message_text("a") == message_text([{"role": "user", "content": "a"}]) == "a"
        assert (
            message_text([{"role": "user", "content": "a"}, {"role": "tool", "content": parts}])
            == "user: a\ntool: b c"
        )


class TestScores:
    def test_equal_to_the_reward_of_each_row_alone(self, reward, tmp_path):
        rows = [message_row(i) if i % 3 else text_row(i) for i in range(13)]
        report, written = scored(reward, rows, tmp_path, block_size=5)
        assert [row["line"] for row in written] == list(range(1, 14))
        assert report.tally.rows == 13 and report.tally.errors == 0 and report.resumed_rows == 0
        for row, record in zip(rows, written, strict=True):
            extra = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
            assert extra == {key: value for key, value in record.items() if key not in OUTPUT_KEYS}
            (outcome,) = reward(prompts=[row["prompt"]], completions=[row["completion"]])
            (tokens,) = reward.token_rewards([row["prompt"]], [row["completion"]])
            (stats,) = reward.score([row["prompt"]], [row["completion"]])
            assert record["reward"] == pytest.approx(outcome, abs=1e-4)
            assert record["token_rewards"] == pytest.approx(tokens.tolist(), abs=1e-4)
            assert record["entropy"] == pytest.approx(stats.entropies.mean().item(), abs=1e-4)
            assert record["num_tokens"] == len(tokens) == len(record["tokens"]) and record["finished"] is True
            assert record["reward_per_token"] == pytest.approx(outcome / len(tokens), abs=1e-4)
            content = row["completion"] if isinstance(row["completion"], str) else row["completion"][0]["content"]
            assert "".join(record["tokens"]).startswith(content)
        assert not (tmp_path / "out.jsonl.errors.jsonl").exists()
        meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
        assert meta["rows"] == 13 and meta["tokens"] == sum(row["num_tokens"] for row in written)
        assert meta["settings"] == {**SETTINGS, "tokens": True} and meta["versions"]["torch"] == version("torch")

    @pytest.mark.parametrize(
        ("form", "aggregate"), [("bellman", "mean"), ("bellman", "discounted"), ("centered", "sum")]
    )
    def test_a_line_has_what_its_reward_is_made_of(self, form, aggregate, tokenizer, tiny_model_path, tmp_path):
        settings = {"alpha": 0.7, "gamma": 0.9, "discount": 0.8, "truncation": "bootstrap"}
        reward = EndogenousReward(tiny_model_path, token_reward=form, aggregate=aggregate, device="cpu", **settings)
        cut_off = {**text_row(3), "completion": " 6 of", "completion_ids": tokenizer(" 6 of")["input_ids"]}
        for record in scored(reward, [text_row(1), message_row(4), cut_off], tmp_path)[1]:
            chosen, values = torch.tensor(record["chosen_logits"]), torch.tensor(record["soft_values"])
            assert record["finished"] == (values[-1] == 0.0)
            if form == "bellman":
                rewards, first = chosen - 0.9 * values[1:], values[0].item()
            else:
                rewards, first = chosen - values[:-1] + 0.7 * torch.tensor(record["entropies"]), 0.0
            assert record["token_rewards"] == pytest.approx(rewards.tolist(), abs=1e-5)
            mean = (sum(record["token_rewards"]) - first) / record["num_tokens"]
            assert record["reward_per_token"] == pytest.approx(mean, abs=1e-5)
            rest = record.get("prompt_contribution", 0.0) + record.get("cut_off_contribution", 0.0)
            assert sum(record["contributions"]) + rest == pytest.approx(record["reward"], abs=1e-4)

    def test_text_of_tools_is_not_scored(self, reward, tmp_path):
        turns = [("assistant", "I look it up."), ("tool", "42"), ("assistant", "It is 42.")]
        row = {**message_row(1), "completion": [{"role": role, "content": text} for role, text in turns]}
        _, (record,) = scored(reward, [row], tmp_path)
        (stats,) = reward.score([row["prompt"]], [row["completion"]])
        text = "".join(record["tokens"])
        assert "I look it up." in text and "It is 42." in text and "tool" not in text
        assert (
            len(record["token_rewards"]) == len(record["tokens"]) == len(stats.token_ids) < stats.num_completion_tokens
        )

    def test_examples_are_the_first_good_rows_even_of_an_earlier_run(self, reward, tmp_path):
        for _ in range(2):
            rows = ["{}", *[text_row(i) for i in range(6)]]
            report, _ = scored(reward, rows, tmp_path, block_size=2, num_examples=3)
            assert [example.row.line for example in report.examples] == [2, 3, 4]
            assert all(example.stats.text is not None for example in report.examples)

    def test_no_more_than_a_block_is_held(self, reward, tmp_path, monkeypatch):
        sizes = []
        score = EndogenousReward.score

        def counting(self, prompts, *args, **kwargs):
            sizes.append(len(prompts))
            # Blocks before this one are on disk, not in memory.
            assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == sum(sizes[:-1])
            return score(self, prompts, *args, **kwargs)

        monkeypatch.setattr(EndogenousReward, "score", counting)
        rows = [text_row(i) for i in range(100)]
        report, _ = scored(reward, rows, tmp_path, block_size=16, num_examples=3)
        assert sizes == [16] * 6 + [4]
        tally = report.tally
        assert len(tally.head) == 10 and len(report.examples) == 3


class TestTokenIds:
    """Rows with the tokens that the policy generated, which alone tell whether an answer came to its end."""

    PROMPT, TEXT = "What is 2 + 2?", " It is, beyond"

    @pytest.fixture
    def cut_off(self, tokenizer):
        return {"prompt": self.PROMPT, "completion": self.TEXT, "completion_ids": tokenizer(self.TEXT)["input_ids"]}

    def score(self, model, rows, tmp_path, **settings):
        return scored(EndogenousReward(model, dtype="float32", device="cpu", **settings), rows, tmp_path)

    def test_skipped(self, cut_off, tokenizer, tiny_model_path, tmp_path):
        finished = {**cut_off, "completion_ids": [*cut_off["completion_ids"], tokenizer.eos_token_id]}
        report, (cut, whole) = self.score(tiny_model_path, [cut_off, finished], tmp_path, truncation="skip")
        assert (cut["finished"], cut["num_tokens"]) == (False, len(cut_off["completion_ids"]))
        assert (whole["finished"], whole["num_tokens"]) == (True, len(cut_off["completion_ids"]) + 1)
        assert cut["reward"] is None and cut["reason"] == "no end-of-sequence token"
        assert set(cut["token_rewards"]) == {None}  # NaN is not JSON
        assert whole["reward"] < 0 and "reason" not in whole
        assert report.tally.skipped == 1 and report.tally.errors == 0

    def test_tokens_are_scored_as_they_are(self, tokenizer, tiny_model_path, tmp_path):
        """The policy may have split a word otherwise than the tokenizer would."""
        ids = [tokenizer.convert_tokens_to_ids(character) for character in "Paris"]
        assert len(tokenizer("Paris")["input_ids"]) < len(ids)
        row = {"prompt": "Where?", "completion": "Paris", "completion_ids": [*ids, tokenizer.eos_token_id]}
        _, (record,) = self.score(tiny_model_path, [row], tmp_path)
        assert record["tokens"] == [*"Paris", "<|im_end|>"] and "completion_ids" not in record

    @pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
    def test_order_is_kept_among_rows_with_and_without(
        self, truncation, cut_off, tiny_model_path, tokenizer, tmp_path
    ):
        reward = EndogenousReward(tiny_model_path, dtype="float32", device="cpu", truncation=truncation)
        chat = {**message_row(3), "completion_ids": tokenizer(message_row(3)["completion"][0]["content"])["input_ids"]}
        text = {key: cut_off[key] for key in ("prompt", "completion")}
        rows = [cut_off, message_row(1), chat, text, {**cut_off, "completion_ids": [True]}, message_row(2), cut_off]
        report, records = scored(reward, rows, tmp_path)
        assert [record["line"] for record in records] == list(range(1, 8)) and report.tally.errors == 1
        assert [record.get("finished") for record in records] == [False, True, False, True, None, True, False]
        for row, record in zip(rows, records, strict=True):
            if "error" not in record:
                ids = [row["completion_ids"]] if "completion_ids" in row else None
                (expected,) = reward(prompts=[row["prompt"]], completions=[row["completion"]], completion_ids=ids)
                assert record["reward"] == pytest.approx(expected, abs=1e-4)

    @pytest.mark.parametrize("row", [text_row(1), {**text_row(1), "completion": ""}, message_row(1)])
    def test_no_token_is_no_reward(self, row, tiny_model_path, tmp_path):
        report, (empty, good) = self.score(tiny_model_path, [{**row, "completion_ids": []}, row], tmp_path)
        assert empty["reward"] is None and empty["reason"] == "no scored token (the completion_ids are empty)"
        assert empty["num_tokens"] == 0 and empty["finished"] is False and empty["tokens"] == []
        assert good["reward"] < 0 and report.tally.skipped == 1 and report.tally.errors == 0

    def test_ids_of_another_tokenizer_leave_the_text(self, cut_off, tiny_model_path, tmp_path):
        """
        Ids that do not spell the completion, or are not in the vocabulary: the text is scored, as a whole answer.
        """
        text = {key: cut_off[key] for key in ("prompt", "completion")}
        foreign = [{**text, "completion_ids": ids} for ids in ([7, 8, 9], [10**6], [10**30])]
        _, records = self.score(tiny_model_path, [text, *foreign], tmp_path)
        assert all(record["finished"] for record in records)
        assert [record["tokens"] for record in records] == [records[0]["tokens"]] * 4


class TestBadRows:
    def test_are_named_and_do_not_stop_the_others(self, reward, tiny_model_path, tmp_path):
        context = json.loads(Path(tiny_model_path, "config.json").read_text())["max_position_embeddings"]
        rows = [
            text_row(0),
            '{"prompt": "a"',
            message_row(1),
            "",  # not a row
            {"id": 9, "prompt": "word " * (context + 1), "completion": "b"},
            message_row(2),
            {"prompt": "a", "completion": ["b"]},
            text_row(3),
        ]
        seen = []
        report, written = scored(reward, rows, tmp_path, on_error=lambda line, error: seen.append((line, error)))
        assert [row["line"] for row in written] == [1, 2, 3, 5, 6, 7, 8]
        bad = [row for row in written if "error" in row]
        assert [row["line"] for row in bad] == [2, 5, 7] and all(row["reward"] is None for row in bad)
        assert report.tally.rows == 7 and report.tally.errors == 3
        assert seen == [(row["line"], row["error"]) for row in bad]
        errors = read_rows(tmp_path / "out.jsonl.errors.jsonl")
        assert errors == [{key: row[key] for key in ("line", "id", "error") if key in row} for row in bad]
        # The reward numbers the rows of its batch, which means nothing to the reader of the file.
        assert errors[1]["id"] == 9 and errors[1]["error"].startswith("This row has")
        # The good rows are scored as if the bad ones were not there.
        _, alone = scored(reward, [rows[i] for i in (0, 2, 5, 7)], tmp_path, overwrite=True)
        for row, expected in zip([row for row in written if "error" not in row], alone, strict=True):
            assert row["reward"] == pytest.approx(expected["reward"], abs=1e-4)

    def test_a_criterion_for_each_domain(self, tiny_model_path, tmp_path):
        reward = EndogenousReward(tiny_model_path, criterion={"law": "Be exact.", "poetry": "Be free."}, device="cpu")
        rows = [{**message_row(1), "domain": domain} for domain in ("law", "poetry", "physics")] + [message_row(1)]
        # As a table writes a row without one.
        rows.append({**message_row(1), "domain": None})
        _, (law, poetry, physics, none, null) = scored(reward, rows, tmp_path)
        assert law["reward"] != poetry["reward"]
        assert "no criterion for the domains ['physics']" in physics["error"]
        for row in (none, null):
            assert "no criterion for the domains [None]" in row["error"] and "['law', 'poetry']" in row["error"]

    def test_a_damaged_model_is_not_the_rows_fault(self, tiny_model_path, tmp_path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
        torch.nn.init.constant_(model.get_input_embeddings().weight, math.nan)
        reward = EndogenousReward(model, AutoTokenizer.from_pretrained(tiny_model_path))
        source = write_rows(tmp_path / "in.jsonl", [text_row(1)])
        with pytest.raises(ValueError, match="NaN"):
            score_file(reward, source, tmp_path / "out.jsonl", SETTINGS)
        assert list(tmp_path.iterdir()) == [source]  # nothing is left behind


def files_of(output: Path) -> tuple[bytes, bytes]:
    """Output and errors."""
    return output.read_bytes(), Path(f"{output}.errors.jsonl").read_bytes()


class TestResume:
    @pytest.fixture
    def source(self, tmp_path):
        rows = [message_row(i) if i % 2 else text_row(i) for i in range(17)]
        rows[6] = '{"prompt": 1}'
        return write_rows(tmp_path / "in.jsonl", rows)

    @pytest.fixture
    def whole(self, reward, source, tmp_path):
        """Output and errors of a run without a break."""
        score_file(reward, source, tmp_path / "whole.jsonl", SETTINGS, block_size=4)
        return files_of(tmp_path / "whole.jsonl")

    @pytest.mark.parametrize("at", [1, 2, 5, 9])  # two calls a block
    def test_after_an_interruption_the_bytes_are_the_same(self, at, reward, tiny_model_path, source, whole, tmp_path):
        output = tmp_path / "out.jsonl"
        with pytest.raises(KeyboardInterrupt):
            score_file(Interrupted(tiny_model_path, device="cpu", at=at), source, output, SETTINGS, block_size=4)
        done = output.read_bytes().count(b"\n")
        assert done == (at - 1) // 2 * 4
        report = score_file(reward, source, output, SETTINGS, block_size=4)
        assert report.resumed_rows == done and report.tally.rows == 17
        assert files_of(output) == whole

    # Some file systems lengthen a file before its data is on disk: after a power cut its end reads as zeros.
    @pytest.mark.parametrize(("cut", "zeros"), [*((cut, 0) for cut in (0, 1, 100, 1000, -1, -20, -500)), (-300, 300)])
    def test_after_a_cut_at_any_byte_the_bytes_are_the_same(self, cut, zeros, reward, source, whole, tmp_path):
        output = tmp_path / "out.jsonl"
        score_file(reward, source, output, SETTINGS, block_size=4)
        output.write_bytes(whole[0][:cut] + bytes(zeros))
        score_file(reward, source, output, SETTINGS, block_size=4)
        assert files_of(output) == whole

    def test_what_was_written_after_the_checkpoint_is_written_again(
        self, reward, tiny_model_path, source, whole, tmp_path
    ):
        """A power cut between the block and its checkpoint, with half a line that went to disk."""
        output = tmp_path / "out.jsonl"
        with pytest.raises(KeyboardInterrupt):
            score_file(Interrupted(tiny_model_path, device="cpu", at=5), source, output, SETTINGS, block_size=4)
        with output.open("ab") as file:
            file.write(whole[0].splitlines(keepends=True)[8] + b'{"line": 10, "rew')
        with Path(f"{output}.errors.jsonl").open("ab") as file:
            file.write(b'{"line"')
        score_file(reward, source, output, SETTINGS, block_size=4)
        assert files_of(output) == whole

    def test_a_finished_run_computes_nothing(self, reward, source, whole, tmp_path, monkeypatch):
        monkeypatch.setattr(EndogenousReward, "score", lambda *_, **__: pytest.fail("scored again"))
        report = score_file(reward, source, tmp_path / "whole.jsonl", SETTINGS, block_size=7)
        assert report.resumed_rows == report.tally.rows == 17 and report.tally.errors == 1
        assert files_of(tmp_path / "whole.jsonl") == whole

    def test_a_smaller_limit_than_the_output_has(self, reward, source, whole, tmp_path):
        with pytest.raises(ValueError, match=r"whole.jsonl has 17 rows, more than `limit=5`"):
            score_file(reward, source, tmp_path / "whole.jsonl", SETTINGS, limit=5)
        assert files_of(tmp_path / "whole.jsonl") == whole
        assert score_file(reward, source, tmp_path / "whole.jsonl", SETTINGS, limit=17).tally.rows == 17

    def test_rows_appended_to_the_input_are_scored(self, reward, source, whole, tmp_path):
        with source.open("a") as file:
            file.write(json.dumps(text_row(99)))
        report = score_file(reward, source, tmp_path / "whole.jsonl", SETTINGS, block_size=4)
        assert report.tally.rows == 18 and report.resumed_rows == 17
        assert (tmp_path / "whole.jsonl").read_bytes().startswith(whole[0])

    def test_statistics_cover_earlier_runs(self, reward, source, tmp_path):
        once = score_file(reward, source, tmp_path / "a.jsonl", SETTINGS).tally
        score_file(reward, source, tmp_path / "b.jsonl", SETTINGS, limit=8)
        twice = score_file(reward, source, tmp_path / "b.jsonl", SETTINGS).tally
        assert twice.tokens == once.tokens and twice.mean_reward == pytest.approx(once.mean_reward, abs=1e-4)
        assert [row.line for row, _ in twice.head] == [row.line for row, _ in once.head]

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ("settings", r"other settings: `alpha` was 1\.0 and is 0\.7"),
            ("tokens", "other settings: `tokens` was True and is False"),
            ("input", "another input: the first 17 lines"),
            ("no meta", r"exists without out\.jsonl\.meta\.json"),
            ("bad meta", "is damaged"),
        ],
    )
    def test_refuses_what_is_not_the_same_run(self, change, reason, reward, source, tmp_path):
        output, settings, tokens = tmp_path / "out.jsonl", dict(SETTINGS), True
        score_file(reward, source, output, settings)
        before = output.read_bytes()
        if change == "settings":
            settings["alpha"] = 0.7
        elif change == "tokens":
            tokens = False
        elif change == "input":
            source.write_bytes(source.read_bytes().replace(b"Double 3", b"Double 4"))
        elif change == "no meta":
            Path(f"{output}.meta.json").unlink()
        else:
            Path(f"{output}.meta.json").write_text("{")
        with pytest.raises(ValueError, match=reason):
            score_file(reward, source, output, settings, tokens=tokens)
        assert output.read_bytes() == before
        report = score_file(reward, source, output, settings, tokens=tokens, overwrite=True)
        assert report.resumed_rows == 0 and report.tally.rows == 17

    def test_an_unfinished_last_line_that_was_completed_since_is_another_input(self, reward, tmp_path):
        source = tmp_path / "in.jsonl"
        source.write_text('{"prompt": "a", "compl')
        score_file(reward, source, tmp_path / "out.jsonl", SETTINGS)
        source.write_text('{"prompt": "a", "completion": "b"}\n')
        with pytest.raises(ValueError, match="another input"):
            score_file(reward, source, tmp_path / "out.jsonl", SETTINGS)


class TestPaths:
    def test_impossible_ones(self, reward, tmp_path):
        source = write_rows(tmp_path / "in.jsonl", [text_row(1)])
        for name in ("limit", "block_size"):
            with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
                score_file(reward, source, tmp_path / "out.jsonl", SETTINGS, **{name: 0})
        (tmp_path / "empty.jsonl").write_text("\n\n")
        with pytest.raises(ValueError, match=r"empty\.jsonl has no rows"):
            score_file(reward, tmp_path / "empty.jsonl", tmp_path / "out.jsonl", SETTINGS)
        assert not (tmp_path / "out.jsonl").exists()

    def test_a_full_disk_keeps_what_is_saved(self, reward, tmp_path):
        resource = pytest.importorskip("resource")  # not on Windows
        source = write_rows(tmp_path / "in.jsonl", [text_row(i) for i in range(40)])
        score_file(reward, source, tmp_path / "whole.jsonl", SETTINGS, block_size=4)
        whole = (tmp_path / "whole.jsonl").read_bytes()
        output = tmp_path / "out.jsonl"
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # A limit of the kernel on the size of files: writing fails in the middle of a line, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, hard))
        try:
            with pytest.raises(
                OSError, match=r"out\.jsonl cannot be written: File too large\. Saved so far: (\d+) rows"
            ):
                score_file(reward, source, output, SETTINGS, block_size=4)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert output.stat().st_size == len(whole) // 2
        report = score_file(reward, source, output, SETTINGS, block_size=4)
        assert 0 < report.resumed_rows < 40 and report.resumed_rows % 4 == 0
        assert output.read_bytes() == whole


class TestTally:
    def test_correlation_is_that_of_torch(self):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 500, (300,), generator=generator)
        rewards = -0.5 * lengths + 40 * torch.randn(300, generator=generator, dtype=torch.float64) + 1e4
        tally = Tally()
        for i, (length, value) in enumerate(zip(lengths.tolist(), rewards.tolist(), strict=True), start=1):
            tally.add(Row(i), {"reward": value, "num_tokens": length})
        expected = torch.corrcoef(torch.stack([lengths.double(), rewards]))[0, 1].item()
        assert tally.length_correlation == pytest.approx(expected, abs=1e-9)
        assert tally.mean_reward == pytest.approx(rewards.mean().item())
        assert [row.line for row, _ in tally.head] == list(range(1, 11))

    def test_correlation_is_none_where_it_is_not_defined(self):
        for records in ([(-1.0, 3), (-2.0, 4)], [(-0.1, n) for n in range(9)], [(0.1 * n, 7) for n in range(9)], []):
            tally = Tally()
            for i, (value, length) in enumerate(records):
                tally.add(Row(i), {"reward": value, "num_tokens": length})
            assert tally.length_correlation is None


# Of very large weights, size, time and samples count; else every byte, as a merged LoRA can change a few matrices.
@pytest.mark.parametrize(("limit", "places"), [(2**31, (0, 4096, 1_234_567)), (2**20, ())])
def test_digest_of_a_model_whose_time_was_set_back(limit, places, tmp_path, monkeypatch):
    monkeypatch.setattr("endotrl.runs.record.WHOLE_WEIGHTS", limit)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(5 * 2**20))  # more than a small file
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    digests = [model_digest(str(tmp_path))]
    assert model_digest(str(shutil.copytree(tmp_path, tmp_path / "copy"))) == digests[0]
    for place in (*places, 5 * 2**20 - 1, 5 * 2**20):  # the last sample; one more byte
        with weights.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        os.utime(weights, ns=times)
        digests.append(model_digest(str(tmp_path)))
    os.utime(weights, ns=(times[0], times[1] + 10**9))
    assert len(set(digests)) == len(places) + 3
    assert (model_digest(str(tmp_path)) != digests[-1]) == (limit == 2**20)
    assert model_digest("some-organisation/some-model") is None


class TestFormats:
    """Rows of TRL's other formats, and other files than JSON Lines."""

    ROWS = [
        {"id": 1, "prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3 of"},
        {"id": 2, "prompt": "2 + 2 =", "completions": [" 4", " 5", " Paris"]},
        {"id": 3, "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The"}]},
        {"id": 4, "prompt": "a"},
        {"id": 5, "prompt": "3 + 3 =", "completion": " 6", "response": "mine"},
        {"id": 6, "prompt": "p", "chosen": "a", "rejected": "b", "response": "taken"},
    ]

    def test_every_response_has_a_line(self, reward, tmp_path):
        report, rows = scored(reward, self.ROWS, tmp_path, block_size=2, tokens=False)
        assert [(row["line"], row.get("response")) for row in rows] == [
            (1, "chosen"), (1, "rejected"), (2, 0), (2, 1), (2, 2), (3, None), (4, None), (5, "mine"), (6, None),
        ]  # fmt: skip
        assert not any(TOKEN_KEYS & row.keys() for row in rows)
        (expected,) = reward(prompts=["2 + 2 ="], completions=[" 5"])
        assert rows[3]["reward"] == pytest.approx(expected, abs=1e-4) and rows[3]["id"] == 2
        assert report.tally.errors == 2 and '"response" is reserved for the output' in rows[8]["error"]

    def test_resumes_within_a_row(self, reward, tiny_model_path, tmp_path):
        source = write_rows(tmp_path / "in.jsonl", self.ROWS)
        score_file(reward, source, tmp_path / "whole.jsonl", SETTINGS, block_size=1)
        with pytest.raises(KeyboardInterrupt):  # between the candidates of row 2
            scored(Interrupted(tiny_model_path, device="cpu", at=5), self.ROWS, tmp_path, block_size=1)
        report, _ = scored(reward, self.ROWS, tmp_path, block_size=1)
        assert report.resumed_rows == 4
        assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


class TestResidual:
    def rows(self, num_prompts):
        return [
            {
                "prompt": f"{i} + 1 =",
                "completion": " a" * (1 + (3 * i + 5 * j) % 7) + "\n- b" * (j % 2),
                "domain": "xy"[i % 2],
            }
            for i in range(num_prompts)
            for j in range(3)
        ]

    @pytest.mark.parametrize("residual", ["residual", "style_residual"])
    def test_as_in_an_evaluation(self, residual, reward, tmp_path):
        """The numbers of `endotrl eval` with the same form, whose groups are the domains."""
        from endotrl.rewards.residuals import covariates_of, residuals

        rows = self.rows(8)
        report, written = scored(reward, rows, tmp_path, residual=residual, block_size=5)
        groups = [written[i : i + 3] for i in range(0, len(rows), 3)]
        texts = [row["completion"] for row in rows]
        covariates = [
            [covariates_of(residual, texts[record["line"] - 1], record["num_tokens"]) for record in group]
            for group in groups
        ]
        expected, slopes = residuals(
            [[record["base_reward"] for record in group] for group in groups],
            covariates,
            [g[0]["domain"] for g in groups],
        )
        assert [record["reward"] for group in groups for record in group] == pytest.approx(sum(expected, []), abs=2e-6)
        assert report.slopes == {"x": pytest.approx(slopes["x"]), "y": pytest.approx(slopes["y"])}
        (plain,) = reward(prompts=[rows[0]["prompt"]], completions=[rows[0]["completion"]])
        assert written[0]["base_reward"] == pytest.approx(plain, abs=1e-4)

    def test_a_longer_input_scores_new_rows_only(self, reward, tmp_path, monkeypatch):
        source = write_rows(tmp_path / "in.jsonl", self.rows(8))
        output = tmp_path / "out.jsonl"
        score_file(reward, source, output, SETTINGS, residual="residual", block_size=6)
        first = output.read_bytes()
        scored = []
        score = EndogenousReward.score
        monkeypatch.setattr(
            EndogenousReward,
            "score",
            lambda self, prompts, *a, **k: scored.extend(prompts) or score(self, prompts, *a, **k),
        )
        write_rows(source, self.rows(10))
        score_file(reward, source, output, SETTINGS, residual="residual", block_size=6)
        assert len(scored) == 6 and output.read_bytes() != first  # the slopes have changed
        whole = tmp_path / "whole.jsonl"
        score_file(reward, source, whole, SETTINGS, residual="residual", block_size=6)
        assert output.read_bytes() == whole.read_bytes()
        with pytest.raises(ValueError, match="other settings: `residual` was 'residual' and is None"):
            score_file(reward, source, output, SETTINGS)

    def test_shards_that_an_interruption_left_are_used(self, reward, tiny_model_path, tmp_path):
        """As after a kill among several processes: with one, the same call goes on."""
        source = write_rows(tmp_path / "in.jsonl", self.rows(8))
        whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
        score_file(reward, source, whole, SETTINGS, block_size=4)
        shards = ShardedScores(
            Interrupted(tiny_model_path, device="cpu", at=4), source, Path(f"{output}.shards"), 4, None, True
        )
        with pytest.raises(KeyboardInterrupt):
            shards.fill({**SETTINGS, "tokens": True})
        with (tmp_path / "out.jsonl.shards" / "0.jsonl").open("ab") as file:
            file.write(b'{"block": "half')  # of a line that was not written to its end
        rest = Interrupted(tiny_model_path, device="cpu", at=99)
        score_file(rest, source, output, SETTINGS, block_size=4)
        assert rest.calls == 3 and output.read_bytes() == whole.read_bytes()  # three of six blocks were done
        assert not (tmp_path / "out.jsonl.shards").exists()
        other = tmp_path / "other.jsonl"
        ShardedScores(reward, source, Path(f"{other}.shards"), 4, 4, True).fill({**SETTINGS, "tokens": True})
        with pytest.raises(ValueError, match=r"other\.jsonl\.shards holds a run with other settings: `alpha`"):
            score_file(reward, source, other, {**SETTINGS, "alpha": 0.5})

    def test_what_it_cannot_do(self, reward, tmp_path):
        source = write_rows(tmp_path / "in.jsonl", [text_row(i) for i in range(5)])
        with pytest.raises(ValueError, match="compares adjacent rows with equal prompts: sort the rows"):
            score_file(reward, source, tmp_path / "out.jsonl", SETTINGS, residual="residual")
        with pytest.raises(ValueError, match="standard input or output cannot be used"):
            score_file(reward, source, "-", SETTINGS, residual="residual")
        with pytest.raises(ValueError, match="`residual` is 'length'"):
            score_file(reward, source, tmp_path / "out.jsonl", SETTINGS, residual="length")
