# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from endotrl import SentenceRewardModel
from endotrl.evaluation.engine import Engine
from endotrl.evaluation.items import Item
from endotrl.frozen.own_copy import OwnCopy
from endotrl.sentence import SentenceRewardConfig


@pytest.fixture(scope="session")
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path).eval()


@pytest.fixture(scope="session")
def tokenizer(tiny_model_path):
    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.fixture(scope="session")
def placement(tiny_model_path):
    return OwnCopy(tiny_model_path, device="cpu")


@pytest.fixture
def engine(placement):
    return Engine(placement)


@pytest.fixture(scope="session")
def pair_items():
    """Pairs of a good and a bad answer, of several lengths."""
    answers = [("Paris.", "Rome, I would say."), ("4", "It is 5, of course, as everyone knows."), ("Yes" * 9, "No")]
    return [Item(f"q{i}", "g", f"Question {i}?", answers[i % 3], better=((0, 1),)) for i in range(6)]


@pytest.fixture(scope="session")
def reward_model_path(tiny_model_path, tmp_path_factory):
    """A sequence-classification checkpoint with one output."""
    path = str(tmp_path_factory.mktemp("models") / "classifier")
    torch.manual_seed(0)
    model = LlamaForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sentence_model_path(tiny_model_path, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("models") / "sentence-reward")
    torch.manual_seed(0)
    SentenceRewardModel.from_backbone(tiny_model_path, SentenceRewardConfig(attention_dim=8)).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(path)
    return path


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """Copies a checkpoint, and lets its tokenizer be of a class of its own, which may run only if it is trusted."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")

    def copy(path):
        folder = shutil.copytree(path, tmp_path / "own_code")
        code = "from transformers import PreTrainedTokenizerFast as Fast\n\n\nclass OwnTokenizer(Fast):\n    pass\n"
        (folder / "own_tokenizer.py").write_text(code)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        auto_map = {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}
        config |= {"tokenizer_class": "OwnTokenizer", "auto_map": auto_map}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return str(folder)

    return copy
