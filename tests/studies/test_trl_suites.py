# SPDX-License-Identifier: Apache-2.0
"""The stand-ins under which TRL's own tests run."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from studies.trl_suites import TEXT, copy_tests, save_tokenizer, templates


SOURCE = r"""
completion_ids = torch.tensor(
    [
        # a call of a tool
        # '<tool_call>\n{"name": "add"}\n</tool_call><|im_end|>' + pad
        [151657, 198, 4913, 151645, 151643],
        # no call, which ends sooner
        # "I won't<|im_end|>"
        [40, 2765, 151645],
    ]
)
rows = [
    [17453, 0, 151645, 151643],  # 'Done!' + eos + pad
    [17453, 17453, 0, 151645],  # 'DoneDone!' + eos + pad
]
"""


def test_written_out_ids_are_those_of_the_text_beside_them(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "test_x.py").write_text(SOURCE)
    copy_tests(tmp_path / "trl", tmp_path, tmp_path / "tokenizer")
    names = {"torch": torch}
    exec((tmp_path / "tests" / "test_x.py").read_text(), names)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    texts = [text.replace("<|endoftext|>", "") for text in tokenizer.batch_decode(names["completion_ids"])]
    assert texts == ['<tool_call>\n{"name": "add"}\n</tool_call><|im_end|>', "I won't<|im_end|>"]
    texts = [text.replace("<|endoftext|>", "") for text in tokenizer.batch_decode(names["rows"])]
    assert texts == ["Done!<|im_end|>", "DoneDone!<|im_end|>"]
    assert len({len(row) for row in names["rows"]}) == 1


def test_the_tokenizer_has_one_token_for_each_end_of_a_turn(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for template, eos, _ in TEXT.values():
        assert template in templates()
        assert len(tokenizer.encode(eos)) == 1
