# SPDX-License-Identifier: Apache-2.0
"""Plans for models that read images."""

from pathlib import Path

import pytest
from transformers import Qwen2_5_VLConfig, Qwen2Config

from endotrl.commands.main import main
from endotrl.commands.plan import read_recipe
from endotrl.planning.sizes import model_size


RECIPE = str(Path(__file__).parents[2] / "recipes" / "qwen2.5-vl-3b" / "grpo.yaml")


@pytest.fixture
def config_only(tmp_path):
    """Qwen2.5-VL-3B's config, without weights."""
    text = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    text |= {"num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 128000}
    text["tie_word_embeddings"] = True
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    config.save_pretrained(tmp_path / "vl-3b")
    return str(tmp_path / "vl-3b")


def test_the_vision_tower_is_counted(config_only):
    """The model card: 3.75 billion parameters, 0.67 of them in the tower."""
    config = Qwen2_5_VLConfig.from_pretrained(config_only)
    assert model_size(config).parameters == pytest.approx(3.75e9, rel=0.01)
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    text = Qwen2Config(
        **{name: getattr(config.text_config, name) for name in kept}, vocab_size=151936, tie_word_embeddings=True
    )
    assert model_size(config).parameters - model_size(text).parameters == pytest.approx(0.67e9, rel=0.01)


def test_the_recipe_fits(config_only, capsys):
    assert main(["plan", RECIPE, "--gpus", "8", "--gpu-memory", "80", "--model", config_only]) == 0
    printed = capsys.readouterr().out
    assert "It fits with" in printed and "zero2.yaml" in printed
    recipe = read_recipe(RECIPE, None, [], config_only, 512)
    # Only projections of the language model: A and B of rank 64 for q, k, v and o of 36 blocks.
    pairs = [(2048, 2048), (2048, 256), (2048, 256), (2048, 2048)]
    assert recipe.size.trainable == 36 * sum(64 * (a + b) for a, b in pairs)
    assert recipe.work.frozen == ()  # the policy without its adapter
