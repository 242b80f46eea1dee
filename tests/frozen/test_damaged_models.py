# SPDX-License-Identifier: Apache-2.0
"""
Models that are damaged, not what they seem, or hostile: an error before anything is scored, and no code of theirs
runs.
"""

import json
import math
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from endotrl import EndogenousReward, SentenceReward, SentenceRewardModel


ROOT = Path(__file__).parents[2]
PROMPTS, COMPLETIONS = ["a b", "c"], ["d e", "f"]


@pytest.fixture
def model(tiny_policy_path, tmp_path):
    return Path(shutil.copytree(tiny_policy_path, tmp_path / "model"))


def cut(path, fraction=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])


def change_weights(change):
    def damage(model):
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return damage


def change_config(**values):
    def damage(model):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **values}))

    return damage


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "weights cut off": lambda model: cut(model / "model.safetensors"),
    "no weights": lambda model: (model / "model.safetensors").unlink(),
    "NaN weights": change_weights(lambda tensors: tensors["model.norm.weight"].fill_(torch.nan)),
    "infinite weights": change_weights(lambda tensors: tensors["lm_head.weight"].fill_(torch.inf)),
    "a weight missing": change_weights(lambda tensors: tensors.pop("model.norm.weight")),
    "weights of another shape": change_config(hidden_size=32),
    "config cut off": lambda model: cut(model / "config.json"),
    "config of no known model": change_config(model_type="nonesuch"),
    "tokenizer cut off": lambda model: cut(model / "tokenizer.json"),
    "no tokenizer": lambda model: [path.unlink() for path in model.glob("*token*")],
    "smaller vocabulary than the tokenizer's": lambda model: (
        change_weights(
            lambda t: t.update({k: t[k][:9].clone() for k in ("model.embed_tokens.weight", "lm_head.weight")})
        )(model),
        change_config(vocab_size=9)(model),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_models_give_no_reward(damage, model):
    damage(model)
    with pytest.raises(Exception, match=r".") as caught:
        EndogenousReward(str(model))(prompts=PROMPTS, completions=COMPLETIONS)
    assert str(caught.value).strip()
    assert not isinstance(caught.value, AssertionError | IndexError | KeyError | AttributeError)


@pytest.fixture(scope="module")
def sentence_model(tiny_model_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("sentence_model")
    SentenceRewardModel.from_backbone(tiny_model_path).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(path)
    return path


@pytest.mark.parametrize("part", ["sentence_head.value", "sentence_head.query", "marker", "layers.0.mlp.up_proj"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_damaged_sentence_reward_models_give_no_reward(part, value, sentence_model, tmp_path):
    """Weights that are missing would be random: a reward that looks like any other."""
    path = Path(shutil.copytree(sentence_model, tmp_path / "model"))

    def damage(tensors):
        for name in [name for name in tensors if part in name]:
            if value is None:
                del tensors[name]
            else:
                tensors[name].fill_(value)

    change_weights(damage)(path)
    error, message = (OSError, f"lacks weights: .*{part}") if value is None else (ValueError, "NaN or infinite scores")
    with pytest.raises(error, match=message):
        SentenceReward(str(path))(prompts=["What? Say."], completions=["It is this. And that."])


def test_a_tokenizer_of_the_same_size_with_other_ids(model, tiny_policy_path):
    """The policy's ids are words here too, but others: what counts is the text."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    letters, vocabulary = "abcdefghijkl", tokenizer["model"]["vocab"]
    vocabulary |= {letter: 7 + (i + 5) % 12 for i, letter in enumerate(letters)}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    ids = AutoTokenizer.from_pretrained(tiny_policy_path)("d e", add_special_tokens=False)["input_ids"]
    reward = EndogenousReward(str(model))
    assert ids != AutoTokenizer.from_pretrained(model)("d e", add_special_tokens=False)["input_ids"]
    as_text = reward(prompts=["a"], completions=["d e"])
    assert reward(prompts=["a"], completions=["d e"], completion_ids=[[*ids, 2]]) == as_text


def test_pickled_weights_do_not_run(model, tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "attacked",)

    (model / "model.safetensors").unlink()
    with (model / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"lm_head.weight": Attack()}, file)
    with pytest.raises(Exception, match=r".") as caught:
        EndogenousReward(str(model))(prompts=PROMPTS, completions=COMPLETIONS)
    assert not isinstance(caught.value, AssertionError)
    assert not (tmp_path / "attacked").exists()


def test_code_of_a_model_does_not_run(model, tmp_path):
    (model / "modeling_attack.py").write_text(f"open({str(tmp_path / 'attacked')!r}, 'w')\n")
    auto_map = {"AutoConfig": "modeling_attack.C", "AutoModelForCausalLM": "modeling_attack.M"}
    change_config(model_type="attack", auto_map=auto_map)(model)
    with pytest.raises(ValueError, match="trust_remote_code"):
        EndogenousReward(str(model))(prompts=PROMPTS, completions=COMPLETIONS)
    assert not (tmp_path / "attacked").exists()


# What no source says: a default of `True` for code of models, text that runs, YAML that makes objects, pickles.
DANGERS = [
    r"trust_remote_code[\"']?(: bool)?\s*[=:]\s*True",
    r"(?<![\w.])(eval|exec|compile)\(|shell=True|os\.(system|popen)|__import__\(",
    r"yaml\.(load|unsafe_load|full_load)\(",
    r"^\s*(import|from) (pickle|dill|cloudpickle|joblib|shelve)\b",
    r"torch\.load\((?![^)]*weights_only=True)",
    r"allow_pickle=True",
]


@pytest.mark.parametrize("danger", DANGERS)
def test_no_source_has(danger):
    sources = [path for folder in ("endotrl", "recipes") for path in ROOT.glob(f"{folder}/**/*.py")]
    if danger == DANGERS[0]:
        sources += [path for folder in ("benchmarks", "studies") for path in ROOT.glob(f"{folder}/**/*.py")]
    assert len(sources) > 100
    for path in sources:
        assert not re.search(danger, path.read_text(encoding="utf-8"), re.MULTILINE), path
