# SPDX-License-Identifier: Apache-2.0
"""The table of the reward's settings against the signature, and the three places that are made from it."""

import inspect
from typing import Any, get_args, get_type_hints

import pytest
from transformers import HfArgumentParser

from endotrl import EndogenousReward
from endotrl.commands.main import make_parser
from endotrl.launch import RewardArguments
from endotrl.rewards import environment
from endotrl.rewards.settings import SETTINGS, parse_aggregate


def made_of(surface: str) -> dict[str, Any]:
    return {name: setting for name, setting in SETTINGS.items() if surface not in setting.absent}


def check_actions(actions: Any, surface: str, prefix: str) -> None:
    actions = {action.dest.removeprefix(prefix): action for action in actions}
    for name, setting in made_of(surface).items():
        assert actions[name].default == setting.default
        assert (None if actions[name].choices is None else set(actions[name].choices)) == (
            None if setting.choices is None else set(setting.choices)
        )
        assert actions[name].help.lower() == setting.help.lower().removesuffix("" if surface == "yaml" else ".")
    assert not set(actions) & set(SETTINGS) - set(made_of(surface))


def test_signature():
    parameters = dict(inspect.signature(EndogenousReward).parameters)
    assert list(parameters)[:2] == ["model", "processing_class"]
    rest = {name: p for name, p in parameters.items() if name not in ("model", "processing_class")}
    assert [(name, p.default) for name, p in rest.items()] == [(s.name, s.default) for s in SETTINGS.values()]
    assert {p.kind for p in rest.values()} == {inspect.Parameter.KEYWORD_ONLY}
    hints = get_type_hints(EndogenousReward.__init__)
    for name in ("token_reward", "truncation", "overlong_prompt"):
        assert SETTINGS[name].choices == get_args(hints[name])


def test_yaml():
    check_actions(HfArgumentParser(RewardArguments)._actions, "yaml", "reward_")
    assert RewardArguments().endogenous_settings == {name: s.default for name, s in made_of("yaml").items()}


def test_score():
    commands: Any = make_parser()._subparsers
    check_actions(commands._group_actions[0].choices["score"]._actions, "score", "")


def test_environment(monkeypatch):
    monkeypatch.setattr(environment, "EndogenousReward", lambda **settings: settings)
    examples = {float: ("0.5", 0.5), int: ("7", 7), bool: ("true", True), str: ("x", "x"), str | None: ("x", "x")}
    expected = {"model": "m"}
    variables = {"ENDOTRL_MODEL": "m"}
    for name, setting in made_of("environment").items():
        text, value = examples.get(setting.type, ('{"a": "b"}', {"a": "b"}))
        variables[f"ENDOTRL_{name.upper()}"], expected[name] = text, value
    assert environment.reward_from_environment(variables) == expected


def test_positional_settings_warn_for_one_release():
    with pytest.warns(FutureWarning, match=r"keyword-only in the next release: pass `alpha=0\.7, gamma=0\.9`"):
        reward = EndogenousReward(None, None, 0.7, 0.9, truncation="skip")
    assert (reward.alpha, reward.gamma, reward.truncation) == (0.7, 0.9, "skip")
    with pytest.raises(TypeError, match="alpha"), pytest.warns(FutureWarning):
        EndogenousReward(None, None, 0.7, alpha=0.7)


def test_a_discount_in_the_aggregate():
    reward = EndogenousReward(None, aggregate="discounted=0.9")
    assert (reward.aggregate, reward.discount) == ("discounted", 0.9)
    assert parse_aggregate("discounted") == ("discounted", None)
