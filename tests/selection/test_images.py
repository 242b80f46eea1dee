# SPDX-License-Identifier: Apache-2.0
"""Responses to the same question about different pictures are not responses to the same prompt."""

import json
from typing import Any

import pytest
from datasets import Dataset

from endotrl import EndogenousReward
from endotrl.data.formats import images_of
from endotrl.score_file.by_prompt import by_prompt
from endotrl.score_file.rows import Row
from endotrl.selection import preference_pairs
from endotrl.sentence.preferences import PairEncoder

from ..support.vision import picture, save_vision_model


QUESTION = [{"role": "user", "content": "What?"}]


def test_pairs(tiny_model_path, tmp_path):
    reward = EndogenousReward(save_vision_model("llava", tiny_model_path, tmp_path))
    shown = [picture(0), picture(1)]
    answers = ["A cat.", "No dog at all"]
    rows = [{"prompt": QUESTION, "completion": answer, "image": one} for one in shown for answer in answers]
    pairs = preference_pairs(reward, Dataset.from_list(rows))
    assert [pair["image"].tobytes() for pair in pairs] == [one.tobytes() for one in shown]
    for pair, one in zip(pairs, shown, strict=True):
        scores = reward([QUESTION] * 2, [[{"role": "assistant", "content": a}] for a in answers], image=[one] * 2)
        assert sorted([pair["score_rejected"], pair["score_chosen"]]) == pytest.approx(sorted(scores), abs=1e-3)


@pytest.mark.parametrize("key", ["image", "images"])
def test_neighbours(key):
    extras: list[dict[str, Any]] = [{key: ["a.png"]}, {key: ["a.png"]}, {key: ["b.png"]}, {}]
    groups = by_prompt((Row(i, QUESTION, "x", extra), {"reward": 1.0}) for i, extra in enumerate(extras))
    assert [[row.line for row, _ in group] for group in groups] == [[0, 1], [2], [3]]


def test_keys():
    assert images_of({"image": "a"}) == ["a"] and images_of({"images": ["a"], "image": "b"}) == ["a"]
    assert images_of(json.loads("{}")) is None
    with pytest.raises(ValueError, match="`images` must be a list, got str"):
        images_of({"images": "a"})


def test_sentence_reward_models_read_text():
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "images": ["a.png"]}
    with pytest.raises(ValueError, match="has images, but a sentence reward model reads only text"):
        PairEncoder(None, None)(row)  # type: ignore[arg-type]
