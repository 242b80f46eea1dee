# SPDX-License-Identifier: Apache-2.0
"""Recipes that come with the package: listed, found, copied, launched by name."""

from pathlib import Path

import pytest

from endotrl.commands.main import main
from endotrl.shipped import accelerate_configs, copy_shipped, local_path, recipes, shipped_path


ROOT = Path(__file__).parents[1]


def test_every_file_is_listed_with_what_it_is() -> None:
    assert set(recipes()) == {str(path.relative_to(ROOT / "recipes")) for path in ROOT.glob("recipes/*/*.yaml")}
    assert all(about[0].isupper() and not about.endswith(".") and "#" not in about for about in recipes().values())
    assert recipes()["qwen2.5-math-7b/ppo.yaml"] == "PPO in EndoRM's setting"
    assert "zero3.yaml" in accelerate_configs()


def test_paths() -> None:
    assert shipped_path("endotrl://smollm2-135m/grpo.yaml") == ROOT / "recipes" / "smollm2-135m" / "grpo.yaml"
    assert shipped_path("zero3.yaml") == ROOT / "accelerate_configs" / "zero3.yaml"
    assert local_path("my/grpo.yaml") == "my/grpo.yaml"
    with pytest.raises(ValueError, match="did you mean smollm2-135m/grpo.yaml"):
        local_path("endotrl://smollm2/grpo.yaml")
    with pytest.raises(ValueError, match="`endotrl recipes` lists them"):
        shipped_path("../pyproject.toml")


def test_copies_are_never_written_over(tmp_path: Path) -> None:
    copied = copy_shipped("smollm2-135m", tmp_path / "mine")
    assert (copied / "pairs.jsonl").read_bytes() == (ROOT / "recipes" / "smollm2-135m" / "pairs.jsonl").read_bytes()
    assert copy_shipped("cpu.yaml", tmp_path).name == "cpu.yaml"
    with pytest.raises(ValueError, match="already exists"):
        copy_shipped("smollm2-135m", tmp_path / "mine")


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert "smollm2-135m/grpo.yaml" in listed
    assert max(len(line) for line in listed.splitlines()) <= 80
    assert "..." not in listed and all(about in " ".join(listed.split()) for about in recipes().values())
