# SPDX-License-Identifier: Apache-2.0
"""Files of rows with images, against the model's own logits of each row alone."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from endotrl.commands.main import main
from endotrl.data.sources import FormatError, HubDataset, read_rows, text_only
from endotrl.evaluation.benchmarks.preference import read
from endotrl.rendering.images import load_picture

from ..support.vision import picture, png, reference_log_prob, save_vision_model


TEXT: list[dict[str, Any]] = [{"role": "user", "content": "What?"}]
PLACED: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


PAIR = {"chosen": answer("A cat."), "rejected": answer("No dog at all")}


@pytest.fixture(scope="module")
def path(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vision_model("llava", tiny_model_path, tmp_path_factory.mktemp("model"))


def log_probs_of(path: str, prompt: Any, pictures: list[Image.Image]) -> list[float]:
    """Of the two answers, each row alone."""
    model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
    end = processor.tokenizer.eos_token_id
    rows = [
        [*processor.tokenizer(text, add_special_tokens=False)["input_ids"], end]
        for text in ("A cat.", "No dog at all")
    ]
    return [reference_log_prob(model, processor, prompt, pictures, ids).sum().item() for ids in rows]


def shown_on(page: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def test_paths_and_base64_in_both_commands(path: str, tmp_path: Path) -> None:
    """`endotrl eval preference` and `endotrl score` on the same file."""
    first, second = picture(0, 640, 400), picture(1)
    first.save(tmp_path / "first.png")
    encoded = base64.b64encode(png(second)).decode()
    inline = [{"role": "user", "content": [{"type": "image", "base64": encoded}, {"type": "text", "text": "What?"}]}]
    rows: list[dict[str, Any]] = [
        {"id": "path", "prompt": TEXT, "image": str(tmp_path / "first.png"), **PAIR},
        {"id": "base64", "prompt": PLACED, "images": [encoded], **PAIR},
        {"id": "implicit", "chosen": [*inline, *PAIR["chosen"]], "rejected": [*inline, *PAIR["rejected"]]},
        {"id": "none", "prompt": TEXT, **PAIR},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shown = [(PLACED, [first]), (PLACED, [second]), (PLACED, [second]), (TEXT, [])]
    expected = [log_probs_of(path, prompt, pictures) for prompt, pictures in shown]
    command = ["eval", "preference", "--model", path, "--device", "cpu", "--data", str(tmp_path / "pairs.jsonl")]
    options = ["--output", str(tmp_path / "out"), "--scorers", "log_prob.sum", "gain.sum", "--quiet"]
    assert main([*command, *options]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for example, wanted in zip(results["examples"], expected, strict=True):
        assert example["scores"]["log_prob.sum"] == pytest.approx(wanted, abs=1e-3)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('alt="Image 1 of the prompt"') == sum(chosen < rejected for chosen, rejected in expected[:3])
    data = (tmp_path / "out" / "examples.html").read_text().partition('id="data">')[2].partition("</script>")[0]
    in_browser = [example["images"] for example in json.loads(data)["examples"]]
    decoded = [[base64.b64decode(image.partition("base64,")[2]) for image in row] for row in in_browser]
    assert [[Image.open(io.BytesIO(image)).size for image in row] for row in decoded] == [
        [(320, 200)],
        *[[(16, 16)]] * 2,
        [],
    ]
    assert decoded[1:3] == [[png(second)]] * 2
    # What was scored is known again by what the picture shows.
    picture(2).save(tmp_path / "first.png")
    before = len((tmp_path / "out" / "scores.jsonl").read_text().splitlines())
    assert main([*command, *options]) == 0
    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == before + 1

    first.save(tmp_path / "first.png")
    bad = [
        {"prompt": PLACED, "image": "https://example.com/cat.png", "completion": PAIR["chosen"]},
        {"prompt": PLACED, "completion": PAIR["chosen"]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, *bad])))
    command = ["score", str(tmp_path / "rows.jsonl"), "--model", path, "--device", "cpu", "--quiet"]
    assert main([*command, "--output", str(tmp_path / "o.jsonl"), "--html", str(tmp_path / "page.html")]) == 1
    written = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in written[:8]] == pytest.approx(sum(expected, []), abs=1e-3)
    assert "is the URL" in written[8]["error"] and "1 of them empty" in written[9]["error"]
    page = (tmp_path / "page.html").read_text()
    sizes = [Image.open(io.BytesIO(image)).size for image in shown_on(page)]
    assert sizes == [(320, 200)] * 2 + [(16, 16)] * 4
    assert encoded not in re.sub(r'src="[^"]+"', "", page)  # nor does it stand in the text


def test_image_features_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear = picture(0).convert("RGBA")
    clear.putalpha(0)  # which a processor, unlike a path, shows on white
    pictures = [[clear, picture(1)], [picture(1), clear]]
    columns = {"prompt": [TEXT] * 2, "chosen": [answer("a")] * 2, "rejected": [answer("b")] * 2, "images": pictures}
    features = datasets.Dataset.from_dict({**columns, "images": [[]] * 2}).features
    data = datasets.Dataset.from_dict(columns, datasets.Features({**features, "images": [datasets.Image()]}))
    data.to_parquet(tmp_path / "pairs.parquet")
    items = read(read_rows(str(tmp_path / "pairs.parquet")))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: data)
    items += read(read_rows(None, HubDataset("owner/name", ("test",))))
    assert items[0].key == items[2].key and items[1].key == items[3].key and items[0].key != items[1].key
    for item, shown in zip(items, 2 * pictures, strict=True):
        assert [load_picture(0, image).tobytes() for image in item.images] == [image.tobytes() for image in shown]
    assert items[0].prompt[0]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": TEXT, "image": "https://example.com/cat.png"}, "line 1: an image of this row is the URL"),
        ({"prompt": PLACED}, "line 1: the prompt of this row has 1 image parts, 1 of them empty"),
        ({"prompt": TEXT, "images": "cat.png"}, "line 1: .*must be a list"),
    ],
)
def test_bad_rows(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**PAIR, **row}))
    with pytest.raises(FormatError, match=reason):
        read(read_rows(str(tmp_path / "pairs.jsonl")))


def test_who_would_not_see_them(
    path: str, tiny_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(0).save(tmp_path / "shown.png")
    row = {"prompt": TEXT, "image": str(tmp_path / "shown.png"), **PAIR}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    command = ["eval", "preference", "--data", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "out")]
    assert main([*command, "--model", tiny_model_path]) == 2
    assert "reads only text" in capsys.readouterr().err
    assert main([*command, "--model", path, "--scorers", "judge_verifier"]) == 2
    assert "has images, but judge_verifier reads only text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_evaluations_leave_no_image_out(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["d"]}))
    with pytest.raises(FormatError, match='line 1: the row has "images", but only text is supported here'):
        list(text_only(read_rows(str(tmp_path / "pairs.jsonl"))))
