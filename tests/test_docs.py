# SPDX-License-Identifier: Apache-2.0
"""
The snippets of the README and of docs/ run as they stand, only smaller: a tiny model for the hub's, and one step. Links
lead somewhere.
"""

import functools
import importlib
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version
from trl import TrlParser
from trl.scripts.grpo import make_parser

from endotrl import EndogenousReward
from endotrl.rewards.environment import reward_from_environment

from .support.fake_server import FakeServer


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/questions/*.md"))]
TEXTS = {
    page.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/"): page.read_text(encoding="utf-8")
    for page in PAGES
}
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
# Those of docs/sentence.md and docs/selection.md build on each other: tests/sentence and tests/selection run them. Of
# others, a comment in the page says why they don't run here.
SNIPPETS = {
    f"{page}-{i}": snippet
    for page, text in TEXTS.items()
    if page not in ("sentence", "selection")
    for i, (comment, snippet) in enumerate(
        re.findall(r"^(<!-- not run: .+ -->\n)?```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL), start=1
    )
    if not comment
}
(CONFIG,) = re.findall(r"^```yaml\n(.*?)^```", TEXTS["trl"], flags=re.MULTILINE | re.DOTALL)


def test_which_snippets_run() -> None:
    pages = {name.rpartition("-")[0] for name in SNIPPETS}
    assert pages == {
        *("README", "index", "trl", "dense", "ppo", "collapse", "forecast", "served", "score"),
        *("questions/lora", "questions/grader"),
    }
    assert len(SNIPPETS) == 12


@pytest.mark.parametrize("snippet", SNIPPETS.values(), ids=SNIPPETS.keys())
def test_snippet(snippet: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common: dict[str, Any] = {"report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False}
    small = {"max_steps": 1, "max_completion_length": 8}
    configs = [("trl", "GRPOConfig")]
    if "DenseGRPO" in snippet or "PPOConfig" in snippet:
        if Version(version("trl")) < Version("1.15"):
            pytest.skip("The trainers of endotrl need TRL 1.15.")
        importlib.import_module("endotrl.trainers.ppo_trainer")  # which keeps TRL's class, not what stands in for it
        # First, because they are subclasses of TRL's and `endotrl` resolves its names on access.
        configs = [("endotrl", "DenseGRPOConfig"), ("endotrl", "PPOConfig"), *configs]
    for module_name, name in configs:
        module = importlib.import_module(module_name)
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), **common, **small), raising=False)
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r"^cat > (\S+) <<'EOF'\n(.*?)^EOF", TEXTS["score"], flags=re.MULTILINE | re.DOTALL):
        Path(name).write_text(text)
    names: dict[str, Any] = {}
    with FakeServer(tiny_model_path) as server:
        text = re.sub(r"quickstart|Qwen/Qwen2\.5[\w.-]+", tiny_model_path, snippet)
        exec(compile(text.replace("http://127.0.0.1:8000/v1", server.url), "docs", "exec"), names)
    assert "trainer.train()" not in snippet or names["trainer"].state.global_step == 1


def test_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # TRL's own parser; what it does not know would go to `accelerate launch`.
    path = tmp_path / "grpo.yaml"
    path.write_text(CONFIG + "use_cpu: true\nbf16: false\n")
    monkeypatch.setenv("ENDOTRL_MODEL", "")  # so that the parser's change of it is undone
    parser = make_parser()
    assert isinstance(parser, TrlParser)
    script, training, model, _ = parser.parse_args_and_config(["--config", str(path)])
    assert script.reward_funcs == ["endotrl.rewards.endogenous_reward"]
    assert (training.beta, training.scale_rewards) == (0.05, "none")
    assert model.model_name_or_path == MODEL
    with pytest.raises(OSError, match=MODEL):  # read, and not to be had offline
        reward_from_environment(yaml.safe_load(CONFIG)["env"])


def test_every_figure_is_explained(tiny_model_path: str) -> None:
    logged: dict[str, Any] = {}
    EndogenousReward(tiny_model_path)(
        prompts=["a", "a"], completions=["b", "c d e"], log_metric=logged.__setitem__, log_extra=logged.__setitem__
    )
    for key in logged:
        assert f"`{key}`" in TEXTS["trl"]


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "@@" not in text  # a placeholder that nobody filled
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
