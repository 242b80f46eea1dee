# SPDX-License-Identifier: Apache-2.0
"""The reward of answers to prompts with images, against the model's own logits of each row alone."""

import base64
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedModel, ProcessorMixin

from endotrl import EndogenousReward
from endotrl.rewards import InformationGain, MeanLogProbReward, RelativePerplexityReward, SelfCertaintyReward
from endotrl.scoring import scorer as scorer_module

from ..support import vision
from ..support.helpers import encode
from ..support.vision import FAMILIES, picture, png, reference_log_prob


@dataclass
class Vision:
    model: PreTrainedModel
    processor: ProcessorMixin

    def ids(self, text: str) -> list[int]:
        return [*encode(self.processor.tokenizer, text), self.processor.tokenizer.eos_token_id]

    def expected(self, prompt: Any, pictures: list[Image.Image], text: str) -> float:
        return reference_log_prob(self.model, self.processor, prompt, pictures, self.ids(text)).sum().item()


@pytest.fixture(scope="module")
def visions(tiny_model_path):
    made = {}
    for family in FAMILIES:
        tokenizer = vision.make_tokenizer(tiny_model_path, family)
        made[family] = Vision(vision.make_model(tokenizer, family), vision.make_processor(tokenizer, family))
    return made


@pytest.fixture
def llava(visions):
    return visions["llava"]


@pytest.fixture(scope="module")
def llava_path(tiny_model_path, tmp_path_factory):
    return vision.save_vision_model("llava", tiny_model_path, tmp_path_factory.mktemp("llava"))


def user(*parts: str) -> list[dict[str, Any]]:
    """A prompt; `"*"` is an image."""
    content = [{"type": "image"} if part == "*" else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


RED, BLUE = picture(0), picture(1)
ONE, TWO, NONE = user("*", "What is it?"), user("Is ", "*", " like ", "*"), user("Hello")
WITH_RED = [{"role": "user", "content": [{"type": "image", "image": RED}]}]
SYSTEM = [{"role": "system", "content": [{"type": "text", "text": "Be short."}]}, *user("*", "What is it?")]
# The same ids with other pictures, several pictures, one of another shape, and a prompt without any.
ROWS = [
    (ONE, [RED]),
    (ONE, [BLUE]),
    (TWO, [RED, BLUE]),
    (TWO, [BLUE, RED]),
    (NONE, []),
    (SYSTEM, [picture(2, 32, 20)]),
]
ANSWERS = ["A cat.", "No, the two are different", "x"]


@pytest.mark.parametrize(
    ("family", "budget"), [*((family, 8192) for family in FAMILIES), ("llava", 60), ("qwen2_5_vl", 60)]
)
def test_against_each_row_alone(family, budget, visions):
    own = visions[family]
    rows = [(prompt, pictures, text) for text in ANSWERS for prompt, pictures in ROWS]  # groups are not together
    expected = [own.expected(*row) for row in rows]
    prompts, images, texts = (list(column) for column in zip(*rows, strict=True))
    reward = EndogenousReward(own.model, own.processor, max_tokens_per_batch=budget)
    completions = [assistant(text) for text in texts]
    assert reward(prompts=prompts, completions=completions, images=images) == pytest.approx(expected, abs=1e-4)
    assert reward._scorer is not None
    assert reward._scorer._shares_image_prompts is (not family.startswith("qwen3_5"))  # linear attention
    # The policy's own tokens, cut off.
    ids = [own.ids(text)[:-1] for text in texts]
    given = reward.score(prompts, completions, ids, images=images)
    for stats, (prompt, pictures, _), row_ids in zip(given, rows, ids, strict=True):
        alone = reference_log_prob(own.model, own.processor, prompt, pictures, row_ids)
        torch.testing.assert_close(stats.log_probs, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_rows_that_cannot_share_a_prompt(family, visions, monkeypatch):
    """A family whose cache does not continue like the whole row is detected and scored row by row."""
    own = visions[family]

    class Forgetful(scorer_module.ImagePrompt):
        def states(self, continuations: Any) -> torch.Tensor:
            return super().states(continuations) * 1.5

    monkeypatch.setattr(scorer_module, "ImagePrompt", Forgetful)
    reward = EndogenousReward(own.model, own.processor)
    ids = [[], *map(own.ids, ANSWERS[:2])]  # the completion that is used to detect it has no token
    nothing, *scores = reward([ONE] * 3, ["", *ANSWERS[:2]], ids, images=[[RED]] * 3)
    assert nothing is None
    assert reward._scorer is not None and reward._scorer._shares_image_prompts is False
    assert scores == pytest.approx([own.expected(ONE, [RED], text) for text in ANSWERS[:2]], abs=1e-4)


def test_an_image_is_encoded_once_for_its_completions(llava, monkeypatch):
    reward = EndogenousReward(llava.model, llava.processor)
    reward(prompts=[ONE], completions=["x"], images=[[RED]])  # detects whether prompts can be shared
    calls: list[int] = []
    tower = llava.model.model.vision_tower
    monkeypatch.setattr(tower, "forward", lambda *a, own=tower.forward, **k: calls.append(1) or own(*a, **k))
    copies = [[RED.copy()] for _ in range(6)]  # a dataset decodes each row anew
    reward(prompts=[ONE] * 6, completions=[str(i) for i in range(6)], images=copies)
    assert len(calls) == 1


def test_forms_in_which_an_image_is_given(llava, tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(png(RED))
    encoded = base64.b64encode(png(RED)).decode()
    texts: list[Any] = [str(path), f"file://{path}", encoded, f"data:image/png;base64,{encoded}"]
    forms = [RED, path, *texts, png(RED), {"bytes": png(RED), "path": None}, {"bytes": None, "path": str(path)}]
    parts = [{"type": "image", "image": form} for form in forms]
    parts += [{"type": "image", "path": str(path)}, {"type": "image", "base64": encoded}]
    parts += [{"type": "image_url", "image_url": {"url": texts[3]}}, {"type": "image", "image": RED, "text": None}]
    reward = EndogenousReward(llava.model, llava.processor)
    expected = llava.expected(ONE, [RED], "x")
    question = {"type": "text", "text": "What is it?", "image": None}  # as datasets fill missing keys
    prompts = [[{"role": "user", "content": [part, question]}] for part in parts]
    assert reward(prompts=prompts, completions=["x"] * len(parts)) == pytest.approx([expected] * len(parts), abs=1e-4)
    plain = [{"role": "user", "content": "What is it?"}]  # TRL's rule: images precede the first user message
    for prompt, column in ((plain, "images"), (ONE, "images"), (plain, "image"), (user("What is it?"), "image")):
        columns = {column: [[RED]] if column == "images" else [RED]}
        assert reward(prompts=[prompt], completions=["x"], **columns) == pytest.approx([expected], abs=1e-4)
    # As TRL hands them over: in the messages and in the column.
    (value,) = reward(prompts=prompts[:1], completions=["x"], images=[[RED]])
    assert value == pytest.approx(expected, abs=1e-4)


class TestOwnCopy:
    def test_by_name(self, llava, llava_path):
        reward = EndogenousReward(llava_path)
        values = reward(prompts=[ONE, ONE, NONE], completions=["x"] * 3, images=[[RED], [BLUE], None])
        expected = [llava.expected(p, i, "x") for p, i in ((ONE, [RED]), (ONE, [BLUE]), (NONE, []))]
        assert values == pytest.approx(expected, abs=1e-4)
        assert pickle.loads(pickle.dumps(reward))(prompts=[ONE], completions=["x"], images=[[RED]]) == values[:1]

    def test_intrinsic_rivals(self, llava, llava_path):
        batch: dict[str, Any] = {"prompts": [ONE, ONE], "completions": ["A cat."] * 2, "images": [[RED], [BLUE]]}
        for kind in (SelfCertaintyReward, MeanLogProbReward, RelativePerplexityReward):
            red, blue = kind(llava_path)(**batch)
            assert red != blue
        expected = reference_log_prob(llava.model, llava.processor, ONE, [RED], llava.ids("A cat."))
        mean = MeanLogProbReward(llava.model, llava.processor)(**batch)
        assert mean[0] == pytest.approx(expected.mean().item(), abs=1e-5)
        # Without its prompt, an answer is the same whatever the image was.
        alone = reference_log_prob(llava.model, llava.processor, user(""), [], llava.ids("A cat."))
        relative = 1 - torch.exp(alone.double().mean() - expected.double().mean()).item()
        given = RelativePerplexityReward(llava.model, llava.processor)(**batch)[0]
        assert given == pytest.approx(max(-1.0, min(1.0, relative)), abs=1e-4)


def test_criterion_and_information_gain(llava):
    gain = InformationGain(llava.model)  # over itself
    reward = EndogenousReward(llava.model, llava.processor, token_reward="log_prob", correction=gain)
    assert reward(prompts=[ONE], completions=["x"], images=[[RED]]) == [0.0]
    reward = EndogenousReward(llava.model, llava.processor, criterion="Be short.")
    (value,) = reward(prompts=[ONE], completions=["x"], images=[[picture(2, 32, 20)]])
    assert value == pytest.approx(llava.expected(SYSTEM, [picture(2, 32, 20)], "x"), abs=1e-4)


def test_groups_of_length_control(llava):
    """Prompts that differ only in their image form two groups, so an image's effect is not taken for that of length."""
    batch: dict[str, Any] = {"prompts": [ONE] * 4, "images": [[RED], [RED], [BLUE], [BLUE]]}
    batch["completions"] = ["x", "A cat.", "xyz", "A cat, or a dog."]
    reward = EndogenousReward(llava.model, llava.processor, correction="length")
    plain = EndogenousReward(llava.model, llava.processor)(**batch)
    reward(**batch)
    lengths = torch.tensor([len(llava.ids(text)) for text in batch["completions"]]).double().log()
    x = lengths - lengths.view(2, 2).mean(1).repeat_interleave(2)
    y = torch.tensor(plain).double() - torch.tensor(plain).double().view(2, 2).mean(1).repeat_interleave(2)
    assert reward.length_slope == pytest.approx(((x @ y) / (x @ x)).item(), rel=1e-4)


class TestIgnored:
    def test_judged_as_an_answer_to_the_text(self, llava):
        reward = EndogenousReward(llava.model, llava.processor, images="ignore")
        values = reward(prompts=[ONE, TWO], completions=["x"] * 2, images=[[RED], [RED, BLUE]])
        texts = [llava.expected(user(*parts), [], "x") for parts in (["What is it?"], ["Is ", " like "])]
        assert values == pytest.approx(texts, abs=1e-4)

    def test_by_a_model_of_text(self, tiny_model_path):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
        prompt = [{"role": "user", "content": "What is it?"}]
        expected = EndogenousReward(tiny_model_path, tokenizer)(prompts=[prompt], completions=["x"])
        batch: dict[str, Any] = {"prompts": [ONE], "completions": ["x"], "images": [[RED]]}
        assert EndogenousReward(tiny_model_path, images="ignore")(**batch) == expected
        with pytest.raises(ValueError, match=r"row 0 has 1 image, but the frozen model reads only text"):
            EndogenousReward(tiny_model_path)(**batch)


class TestRefused:
    """Inputs whose reward would be for an answer to another question are rejected before anything is computed."""

    @pytest.fixture
    def reward(self, llava, monkeypatch):
        reward = EndogenousReward(llava.model, llava.processor)
        monkeypatch.setattr(reward, "_score_rows", lambda *args, **kwargs: pytest.fail("computed"))
        return reward

    @pytest.mark.parametrize(
        ("prompt", "columns", "message"),
        [
            (ONE, {}, "has 1 image parts, 1 of them empty"),
            (TWO, {"images": [[RED]]}, "has 2 image parts.* have 1 images for it"),
            (ONE, {"images": [[RED, BLUE]]}, "has 1 image parts.* have 2 images for it"),
            (user("<image>What?"), {}, "rejects a prompt with 0 images: Found 1 <image> tokens"),
            ("<image>What?", {}, "rejects a prompt with 0 images: Found 1 <image> tokens"),
            ("What?", {"images": [[RED]]}, "prompt is plain text.*conversational"),
            ([{"role": "system", "content": "a"}], {"images": [[RED]]}, "no user message"),
            (WITH_RED, {"images": [[BLUE]]}, "no other images in the columns"),
            (ONE, {"images": [[RED], [RED]]}, "`images` has 2 entries for 1 prompts"),
            (ONE, {"images": [["https://example.com/a.png"]]}, "is the URL 'https://example.com/a.png'"),
            (ONE, {"images": [["/nowhere/a.png"]]}, "cannot be read: .*No such file"),
            (ONE, {"images": [[b"abc"]]}, "cannot be read: cannot identify"),
            (user({"type": "video"}), {}, "part of type"),
        ],
    )
    def test_prompts(self, prompt, columns, message, reward):
        completion = "x" if isinstance(prompt, str) else assistant("x")
        with pytest.raises(ValueError, match=message):
            reward(prompts=[prompt], completions=[completion], **columns)

    @pytest.mark.parametrize(
        ("images", "message"), [([RED], "must be a list of images"), ([[3]], "uint8 array, got int")]
    )
    def test_what_is_no_image(self, images, message, reward):
        with pytest.raises(TypeError, match=message):
            reward(prompts=[ONE], completions=["x"], images=images)

    def test_completions(self, llava, reward):
        batch: dict[str, Any] = {"prompts": [ONE], "images": [[RED]]}
        with pytest.raises(ValueError, match="completion of row 0 has a content part of type 'image'"):
            reward(**batch, completions=[[{"role": "assistant", "content": [{"type": "image", "image": RED}]}]])
        ids = [llava.ids("a<image>")]
        for more in ({"completions": ["a <image>"]}, {"completions": ["a"], "completion_ids": ids}):
            with pytest.raises(ValueError, match="completion of row 0 has a token that stands for an image"):
                EndogenousReward(llava.model, llava.processor)(**batch, **more)

    def test_truncation(self, llava):
        reward = EndogenousReward(llava.model, llava.processor, overlong_prompt="truncate_left")
        with pytest.raises(ValueError, match="A prompt with images is not truncated"):
            reward(prompts=[user("*", "What? " * 200)], completions=["x"], images=[[RED]])
        reward(prompts=[user("What? " * 200)], completions=["x"])  # text is, as before

    def test_a_tokenizer_in_place_of_a_processor(self, llava):
        tokenizer = pickle.loads(pickle.dumps(llava.processor.tokenizer))
        tokenizer.chat_template = llava.processor.chat_template
        reward = EndogenousReward(llava.model, tokenizer)
        with pytest.raises(ValueError, match="`processing_class` is a tokenizer.*Pass the frozen model's processor"):
            reward(prompts=[ONE], completions=["x"], images=[[RED]])
        with pytest.raises(ValueError, match="stands for an image.*'<image>'.*no input for it"):
            reward(prompts=["<image>What?"], completions=["x"])

    def test_processors_of_other_models(self, visions):
        for ours, theirs in (("llava", "qwen2_vl"), ("qwen2_vl", "llava"), ("gemma3", "llava"), ("llava", "idefics3")):
            reward = EndogenousReward(visions[ours].model, visions[theirs].processor)
            with pytest.raises(ValueError, match="processor|vocabulary"):
                reward(prompts=[ONE], completions=["x"], images=[[RED]])

    def test_a_template_that_leaves_images_out(self, llava):
        template = llava.processor.chat_template.replace("<image>", "")
        reward = EndogenousReward(llava.model, llava.processor, chat_template_kwargs={"chat_template": template})
        with pytest.raises(ValueError, match="leaves out an image in message 1"):
            reward(prompts=[ONE], completions=["x"], images=[[RED]])
