# SPDX-License-Identifier: Apache-2.0
import gzip
import io
import json
import sys
import tracemalloc
from datetime import datetime
from itertools import islice
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict

from endotrl.data.formats import responses_of
from endotrl.data.sources import FormatError, HubDataset, Reader, read_rows
from endotrl.evaluation.benchmarks import BENCHMARKS

from ..evaluation.rows import (
    BEST_OF_FOUR_ROW,
    JUDGE_ROW,
    PAIR_ROW,
    RM_BENCH_ROW,
    items_of,
    prm_row,
    process_row,
    write,
)


class TestReading:
    def test_every_kind_of_file_is_the_same_input(self, tmp_path):
        rows = [{"a": i, "b": "é\u2028x"} for i in range(5)]
        write(tmp_path / "f.json", rows)
        write(tmp_path / "f.jsonl", rows)
        (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress((tmp_path / "f.jsonl").read_bytes()))
        Dataset.from_list(rows).to_parquet(str(tmp_path / "f.parquet"))
        digests = set()
        for name in ("f.json", "f.jsonl", "f.jsonl.gz", "f.parquet"):
            reader = Reader(tmp_path / name)
            assert [row.data for row in islice(reader, 3)] == rows[:3], name
            assert reader.lines == 3 and reader.digest.hexdigest() == Reader(tmp_path / name).prefix_digest(3)
            assert reader.count() == 5
            digests.add(reader.digest.hexdigest())
        assert len(digests) == 1
        assert len(list(read_rows(str(tmp_path)))) == 20

    def test_place_of_a_row(self, tmp_path):
        (tmp_path / "f.json").write_text('[\n {"a": 1},\n\n {"a":\n 2}]')
        assert [row.place for row in read_rows(str(tmp_path / "f.json"))] == ["row 1", "row 2"]
        (tmp_path / "f.jsonl").write_text('\n{"a": 1}\n')
        assert [row.place for row in read_rows(str(tmp_path / "f.jsonl"))] == ["line 2"]


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{\n", r"f.jsonl, line 1: not valid JSON"),
            ('{"a": 1}\n[1]', r"f.jsonl, line 2: a row must be a JSON object, got \[1\]"),
            ("", r"f.jsonl: the file has no rows"),
            ("[\n{},\n{]", r"f.jsonl: not valid JSON: .*line 3 "),
            ("[{}\n{}]", r"f.jsonl: not valid JSON: Expecting ',' delimiter: line 2 "),
            ("[{}]\n[{}]", r"f.jsonl: not valid JSON: Extra data: line 2 "),
            ('{"a": 1}\n{"a": "\\ud83d"}', r"f.jsonl, line 2: the text has half of a surrogate pair"),
        ],
    )
    def test_damaged_files(self, tmp_path, text, message):
        (tmp_path / "f.jsonl").write_text(text)
        with pytest.raises(FormatError, match=message):
            list(read_rows(str(tmp_path / "f.jsonl")))

    @pytest.mark.parametrize(
        ("benchmark", "row", "message"),
        [
            ("preference", {"chosen": "a"}, r'line 2: the key "rejected" is missing'),
            ("preference", {**PAIR_ROW, "chosen": 3}, r"line 2: the chosen must be text or a list of messages"),
            ("preference", {"chosen": "a", "rejected": "b"}, "share no beginning"),
            ("rm-bench", {**RM_BENCH_ROW, "chosen": ["a"]}, r'"chosen" must be a list of 3 texts, got \["a"\]'),
            ("reward-bench", {**PAIR_ROW, "subset": "x"}, r'line 2: "subset" must be one of'),
            ("rm-bench", {**RM_BENCH_ROW, "domain": "Chat"}, r'"domain" must begin with one of chat, math, code'),
        ],
    )
    def test_rows_name_file_line_and_rule(self, tmp_path, benchmark, row, message):
        pair = {**PAIR_ROW, "subset": "donotanswer"}
        good = {"preference": PAIR_ROW, "rm-bench": RM_BENCH_ROW, "reward-bench": pair}
        path = write(tmp_path / "chat.jsonl", [good[benchmark], row])
        with pytest.raises(FormatError, match=message) as error:
            items_of(benchmark, path)
        assert str(error.value).startswith(path)

    def test_truncated_files(self, tmp_path):
        Dataset.from_list([PAIR_ROW]).to_parquet(str(tmp_path / "f.parquet"))
        (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 10_000))
        for name, kind in (("f.parquet", "Parquet"), ("f.jsonl.gz", "gzip")):
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
            with pytest.raises(FormatError, match=f"{name}: cannot be read as {kind}"):
                list(Reader(tmp_path / name))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
            list(read_rows(str(tmp_path / "none")))
        with pytest.raises(ValueError, match="the folder has no files that end with"):
            list(read_rows(str(tmp_path)))
        with pytest.raises(ValueError, match="dsp is not on the Hugging Face hub. Pass its file or folder as --data"):
            list(read_rows(None, None, "dsp"))

    def test_saved_datasets(self, tmp_path):
        Dataset.from_list([{"a": 1}]).save_to_disk(tmp_path / "one")
        DatasetDict({"test": Dataset.from_list([{"a": 1}])}).save_to_disk(tmp_path / "more")
        for name in ("one", "more"):
            with pytest.raises(ValueError, match=f"{name}: the folder was made by `save_to_disk`.*`to_parquet`"):
                Reader(tmp_path / name)

    def test_splits_of_a_folder_are_named(self, tmp_path, caplog):
        for name in ("main/test-0.jsonl", "main/train-0.jsonl", "more/train/a.jsonl"):
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            write(tmp_path / name, [{"a": 1}])
        assert len(list(read_rows(str(tmp_path)))) == 3
        assert "has several splits, all of which are read (test, train). Pass one" in caplog.text
        caplog.clear()
        assert len(list(read_rows(str(tmp_path / "more")))) == 1 and not caplog.text

    def test_hub_out_of_reach(self):
        with pytest.raises(ValueError, match="cannot be loaded from the Hugging Face hub.*--data"):
            list(read_rows(None, HubDataset("endotrl/none", ("test",)), "x"))

    def test_long_values_are_cut(self, tmp_path):
        with pytest.raises(FormatError) as error:
            items_of("reward-bench", write(tmp_path / "f.jsonl", [{**PAIR_ROW, "subset": "y" * 5000}]))
        assert len(str(error.value)) < 1500


class TestHub:
    """`datasets` takes a folder of that name for the dataset, so that its own loading is run without network."""

    ROWS = {
        "rm-bench": {"train": [{**RM_BENCH_ROW, "domain": "safety-refuse"}, {**RM_BENCH_ROW, "domain": "math"}]},
        "reward-bench": {"filtered": [{**PAIR_ROW, "subset": "donotanswer", "id": 1}]},
        "llmbar": {"filtered": [{**PAIR_ROW, "subset": "llmbar-natural", "id": 1}]},
        "reward-bench-2": {
            "test": [
                BEST_OF_FOUR_ROW,
                {**BEST_OF_FOUR_ROW, "subset": "Ties", "id": "ref:0"},
                {**BEST_OF_FOUR_ROW, "subset": "Ties", "id": "tied:0", "chosen": ["a", "e"]},
            ]
        },
        "process-bench": {
            split: [{**process_row(1, id=f"{split}-0"), "final_answer_correct": False}]
            for split in ("gsm8k", "math", "olympiadbench", "omnimath")
        },
        "prm-bench": {"train": [prm_row([2])]},
        "judge-bench": {split: [{**JUDGE_ROW, "pair_id": split}] for split in ("gpt", "claude")},
    }

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()

    def upload(self, tmp_path, name, splits):
        (tmp_path / name / "data").mkdir(parents=True)
        for split, rows in splits.items():
            Dataset.from_list(rows).to_parquet(str(tmp_path / name / "data" / f"{split}-00000-of-00001.parquet"))

    def test_every_benchmark_that_has_one_is_tried(self):
        assert set(self.ROWS) == {name for name, benchmark in BENCHMARKS.items() if benchmark.hub is not None}

    @pytest.mark.parametrize("name", ROWS)
    def test_its_splits_become_items(self, tmp_path, name):
        benchmark = BENCHMARKS[name]
        self.upload(tmp_path, benchmark.hub.name, self.ROWS[name])
        items = benchmark.read(read_rows(None, benchmark.hub, name))
        assert len(items) == sum(map(len, self.ROWS[name].values()))
        assert {item.group for item in items} == {
            "rm-bench": {"safety-refuse", "math"}, "reward-bench": {"donotanswer"}, "llmbar": {"Natural"},
            "reward-bench-2": {"Math", "Ties"}, "process-bench": set(self.ROWS["process-bench"]),
            "prm-bench": {"circular"}, "judge-bench": {"Mathematics"},
        }[name]  # fmt: skip

    def test_any_preference_dataset(self, tmp_path):
        splits = {"test": [PAIR_ROW], "train": [PAIR_ROW, {**PAIR_ROW, "prompt": "Say no"}]}
        self.upload(tmp_path, "some/pairs", splits)
        assert len(items_of("preference", "some/pairs:train")) == 2
        assert len(items_of("preference", "some/pairs:test")) == 1
        self.upload(tmp_path, "some/others", {"train": [{"chosen": "a"}]})
        with pytest.raises(FormatError, match=r'some/others \(train\), row 1: the key "rejected" is missing'):
            items_of("preference", "some/others:train")
        with pytest.raises(ValueError, match=r"some/none \(split test\) is not a local file or folder"):
            items_of("preference", "some/none")


class TestFolders:
    def test_hidden_files_are_none(self, tmp_path):
        write(tmp_path / "pairs.jsonl", [PAIR_ROW])
        (tmp_path / "._pairs.jsonl").write_bytes(b"\x00\x05\x16\x07")
        assert len(items_of("preference", str(tmp_path))) == 1

    def test_files_of_the_folders_below(self, tmp_path):
        row = {"input": "i", "output_1": "a", "output_2": "b", "label": 2}
        for name in ("Natural", "Adversarial/Neighbor"):
            (tmp_path / name).mkdir(parents=True)
            write(tmp_path / name / "dataset.json", [row])
        assert [item.group for item in items_of("llmbar", str(tmp_path))] == ["Neighbor", "Natural"]

    def test_the_whole_beside_its_parts_counts_once(self, tmp_path):
        rows = [{**RM_BENCH_ROW, "id": i, "prompt": str(i)} for i in range(3)]
        write(tmp_path / "chat_filtered.json", rows[:2])
        write(tmp_path / "math_filtered.json", rows[2:])
        total = [{**row, "domain": "chat" if i < 2 else "math"} for i, row in enumerate(rows)]
        write(tmp_path / "total_dataset.json", total)
        assert [(item.group, item.id) for item in items_of("rm-bench", str(tmp_path))] == [
            ("chat", "0"), ("chat", "1"), ("math", "2"),
        ]  # fmt: skip


class TestStreams:
    ROWS = [{"a": i, "b": "é[{\n" * (i % 3), "c": [{"d": [i, "]"]}] * (i % 4)} for i in range(300)]

    @pytest.mark.parametrize("indent", [None, 2])
    def test_elements_of_an_array(self, tmp_path, indent):
        path = tmp_path / "f.json"
        path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(self.ROWS, indent=indent, ensure_ascii=False).encode())
        rows = list(Reader(path))
        assert [row.data for row in rows] == self.ROWS and [row.number for row in rows] == list(range(1, 301))

    @pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.parquet"])
    def test_memory_does_not_grow_with_the_file(self, tmp_path, name):
        count, text = 4000, "x" * 2000  # 8 MB
        path, rows = tmp_path / name, [{"prompt": text, "completion": str(i)} for i in range(4000)]
        if name.endswith("parquet"):
            Dataset.from_list(rows).to_parquet(str(path))
        else:
            data = "".join(json.dumps(row) + "\n" for row in rows)
            path.write_bytes(gzip.compress(data.encode()) if name.endswith("gz") else data.encode())
        del rows
        next(iter(Reader(path)))  # imports
        tracemalloc.start()
        assert sum(1 for _ in Reader(path)) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5e6

    def test_standard_input(self, monkeypatch):
        for data in (b'{"a": 1}\n\n{"a": 2}', b'[{"a": 1}, {"a": 2}]'):
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
            reader = Reader("-")
            assert reader.count(7) == 7 and [row.data["a"] for row in reader] == [1, 2]

    def test_tables_hold_more_than_json(self, tmp_path):
        row = {
            "when": datetime(2026, 1, 2, 3, 4),
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [1]}],
        }
        Dataset.from_list([row]).to_parquet(str(tmp_path / "f.parquet"))
        (read,) = Reader(tmp_path / "f.parquet")
        # No nulls with which the table fills the messages up: templates ask whether a key is there.
        assert read.data == {"when": "2026-01-02T03:04:00", "messages": row["messages"]}


class TestFormats:
    USER, ANSWER = {"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}

    @pytest.mark.parametrize(
        ("row", "prompt", "completions", "names"),
        [
            ({"prompt": "p", "completion": "a", "chosen": 1}, "p", ["a"], [None]),
            ({"prompt": "p", "completion": "a", "label": True}, "p", ["a"], [None]),
            ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p", ["a", "b"], ["chosen", "rejected"]),
            ({"chosen": "p a", "rejected": "p b"}, "p", [" a", " b"], ["chosen", "rejected"]),
            ({"prompt": None, "chosen": "p a", "rejected": "p b"}, "p", [" a", " b"], ["chosen", "rejected"]),
            ({"prompt": "p", "completions": ["a", "b", "c"]}, "p", ["a", "b", "c"], [0, 1, 2]),
            ({"messages": [USER, ANSWER]}, [USER], [[ANSWER]], [None]),
            ({"prompt": [USER], "completions": [[ANSWER], "b"]}, [USER], [[ANSWER], "b"], [0, 1]),
            ({"chosen": [USER, ANSWER], "rejected": [USER, USER]}, [USER], [[ANSWER], [USER]], ["chosen", "rejected"]),
        ],
    )
    def test_all_that_have_responses(self, row, prompt, completions, names):
        read = responses_of({**row, "id": 7})
        assert (read.prompt, read.completions, read.names) == (prompt, completions, names)
        assert read.extra == {key: value for key, value in row.items() if key in ("label",) or value == 1} | {"id": 7}

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"text": "p"}, 'The key "prompt" is missing'),
            ({"prompt": "p", "completions": ["step"], "labels": [True]}, "not the steps of one"),
            ({"prompt": "p", "completions": []}, "must be a list of one or more whole responses"),
            (
                {"prompt": "p", "completions": ["a"], "completion_ids": [[1], [2]]},
                "one list of token ids per completion",
            ),
            (
                {"prompt": "p", "completions": ["a"], "completion_ids": [[-1]]},
                "Entry 1 .* whole number from 0, got -1",
            ),
            ({"prompt": "p", "completions": [3]}, "The completion 0 must be text or a list of messages"),
            ({"prompt": "p", "chosen": "a"}, 'The key "rejected" is missing'),
            ({"chosen": "a", "rejected": "b"}, "share no beginning"),
            ({"messages": [USER]}, "must end with an assistant message"),
            ({"prompt": "p", "chosen": [ANSWER], "rejected": [ANSWER]}, "The prompt is text, but the completion is"),
        ],
    )
    def test_what_is_none(self, row, reason):
        with pytest.raises(ValueError, match=reason):
            responses_of(row)


def test_hub_names():
    name = lambda text: [(p.name, p.config, p.splits) for p in Reader(text, "train")._parts]  # noqa: E731
    assert name("openai/gsm8k") == [("openai/gsm8k", None, ("train",))]
    assert name("openai/gsm8k:test") == [("openai/gsm8k", None, ("test",))]
    assert name("openai/gsm8k/main:test") == [("openai/gsm8k", "main", ("test",))]
