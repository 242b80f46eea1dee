# SPDX-License-Identifier: Apache-2.0
"""`endotrl eval preference` on rows with images, against the model's own logits of each row alone."""

import base64
import io
import json
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

from ..support.vision import picture, reference_log_prob, save_vision_model


TEXT: list[dict[str, Any]] = [{"role": "user", "content": "What?"}]
PLACED: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


PAIR = {"chosen": answer("A cat."), "rejected": answer("No dog at all")}


def png(shown: Image.Image) -> bytes:
    buffer = io.BytesIO()
    shown.save(buffer, format="png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def path(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vision_model("llava", tiny_model_path, tmp_path_factory.mktemp("model"))


def test_scores(path: str, tmp_path: Path) -> None:
    first, second = picture(0), picture(1)
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
    command = ["eval", "preference", "--model", path, "--device", "cpu", "--data", str(tmp_path / "pairs.jsonl")]
    options = ["--output", str(tmp_path / "out"), "--scorers", "log_prob.sum", "gain.sum", "--quiet"]
    assert main([*command, *options]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)

    def expected(prompt: Any, pictures: list[Image.Image], text: str) -> float:
        ids = [*processor.tokenizer(text, add_special_tokens=False)["input_ids"], processor.tokenizer.eos_token_id]
        return reference_log_prob(model, processor, prompt, pictures, ids).sum().item()

    shown = [(PLACED, [first]), (PLACED, [second]), (PLACED, [second]), (TEXT, [])]
    for example, (prompt, pictures) in zip(results["examples"], shown, strict=True):
        wanted = [expected(prompt, pictures, text) for text in ("A cat.", "No dog at all")]
        assert example["scores"]["log_prob.sum"] == pytest.approx(wanted, abs=1e-3)
    page = (tmp_path / "out" / "report.html").read_text()
    wrong = [e["scores"]["log_prob.sum"] for e in results["examples"][:3]]
    assert page.count('alt="Image 1 of the prompt"') == sum(chosen < rejected for chosen, rejected in wrong)

    data = (tmp_path / "out" / "examples.html").read_text().partition('id="data">')[2].partition("</script>")[0]
    images = [example["images"] for example in json.loads(data)["examples"]]
    shown_in_browser = [
        [base64.b64decode(image.partition("data:image/png;base64,")[2]) for image in row] for row in images
    ]
    assert shown_in_browser == [[png(first)], [png(second)], [png(second)], []]

    # What was scored is known again by what the picture shows.
    picture(2).save(tmp_path / "first.png")
    before = len((tmp_path / "out" / "scores.jsonl").read_text().splitlines())
    assert main([*command, *options]) == 0
    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == before + 1


def test_image_features_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [[picture(0), picture(1)], [picture(1), picture(0)]]
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
        ({"prompt": TEXT, "image": "nowhere.png"}, "line 1: an image of this row cannot be read"),
        ({"prompt": PLACED}, "line 1: the prompt of this row has 1 images in its messages, 1 of them without"),
        ({"prompt": "What?", "chosen": "a", "rejected": "b", "images": ["x.png"]}, "this row has 1 images and a pro"),
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
    assert "has images, and judge_verifier reads only text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_evaluations_leave_no_image_out(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["d"]}))
    with pytest.raises(FormatError, match='line 1: the row has "images", and this reads only text'):
        list(text_only(read_rows(str(tmp_path / "pairs.jsonl"))))
