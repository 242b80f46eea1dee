# SPDX-License-Identifier: Apache-2.0
"""Rows with images in `endotrl score`: paths and base64, bad ones, and the picture beside the heat map."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from endotrl import EndogenousReward
from endotrl.score_file import score_file
from endotrl.score_file.score_summary import heat_map_page

from ..support.vision import picture, reference_log_prob, save_vision_model


QUESTION: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
ANSWER = [{"role": "assistant", "content": "A cat."}]


@pytest.fixture(scope="module")
def path(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vision_model("idefics3", tiny_model_path, tmp_path_factory.mktemp("model"))


def test_a_file_with_images(path: str, tmp_path: Path) -> None:
    pictures = [picture(0, 640, 400), picture(1)]
    pictures[0].save(tmp_path / "first.png")
    buffer = io.BytesIO()
    pictures[1].save(buffer, format="png")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    inline = [{"role": "user", "content": [{"type": "image", "base64": encoded}, {"type": "text", "text": "What?"}]}]
    rows: list[dict[str, Any]] = [
        {"prompt": QUESTION, "completion": ANSWER, "images": [str(tmp_path / "first.png")]},
        {"prompt": inline, "completion": ANSWER},
        {"prompt": [{"role": "user", "content": "What?"}], "completion": ANSWER, "image": encoded},
        {"prompt": [{"role": "user", "content": "What?"}], "completion": ANSWER},
        {"prompt": QUESTION, "completion": ANSWER, "image": "https://example.com/cat.png"},
        {"prompt": QUESTION, "completion": ANSWER},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    reward = EndogenousReward(path)
    report = score_file(reward, tmp_path / "rows.jsonl", tmp_path / "out.jsonl", {}, num_examples=4)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
    ids = [*processor.tokenizer("A cat.", add_special_tokens=False)["input_ids"], processor.tokenizer.eos_token_id]
    text = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    of_rows = [(QUESTION, pictures[:1]), (QUESTION, pictures[1:]), (QUESTION, pictures[1:]), (text, [])]
    expected = [reference_log_prob(model, processor, prompt, of, ids).sum().item() for prompt, of in of_rows]
    assert [row["reward"] for row in written[:4]] == pytest.approx(expected, abs=1e-3)
    assert "is the URL" in written[4]["error"] and "1 of them without a picture" in written[5]["error"]

    page = heat_map_page(report, reward, file="rows.jsonl", model="m", output="out.jsonl", command="c", settings={})
    shown = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert [Image.open(io.BytesIO(data)).size for data in shown] == [(320, 200), (16, 16), (16, 16)]
    assert encoded not in re.sub(r'src="[^"]+"', "", page)  # nor does it stand in the text
