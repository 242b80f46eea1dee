# SPDX-License-Identifier: Apache-2.0
"""
Settings of the endogenous reward: one table, which defines the YAML fields `reward_<name>`, the options of `endotrl
score` and `endotrl eval`, and the environment variables `ENDOTRL_<NAME>`. Imports nothing heavy.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from ..checks import check_choice
from ..field_help import with_help


TokenReward = Literal["bellman", "log_prob", "centered", "negative_entropy", "self_certainty"]
Truncation = Literal["terminal", "bootstrap", "skip"]
CorrectionName = Literal["length", "clip"]

# Types of settings given as JSON on a command line.
JSON = dict[str, Any] | None
CRITERION = dict[str, str] | str | None
INIT_KWARGS = dict[str, Any] | str | None

TOKEN_REWARDS = get_args(TokenReward)
AGGREGATES = ("sum", "mean", "discounted", "power", "first", "min")
# Aggregates with a number, and an example of it.
EXAMPLES = {"discounted": "0.95", "power": "0.5", "first": "20"}


def parse_aggregate(aggregate: str) -> tuple[str, float | None]:
    """Name and number of an aggregate, such as `"sum"` or `"power=0.5"`."""
    name, has_number, text = aggregate.partition("=") if isinstance(aggregate, str) else (aggregate, "", "")
    check_choice("aggregate", name, AGGREGATES)
    if not has_number:
        if name in ("power", "first"):
            raise ValueError(f"`aggregate` is {name!r}, but it needs a number, such as {name}={EXAMPLES[name]}.")
        return name, None
    if name not in EXAMPLES:
        raise ValueError(f"`aggregate` is {aggregate!r}, but {name!r} takes no number.")
    try:
        number = float(text)
    except ValueError as error:
        raise ValueError(f"`aggregate` is {aggregate!r}, but {text!r} is not a number.") from error
    fits, rule = {
        "discounted": (0 < number <= 1, "greater than 0 and at most 1"),
        "power": (math.isfinite(number), "finite"),
        "first": (1 <= number < math.inf, "finite and at least 1"),
    }[name]
    if not fits:
        raise ValueError(f"`aggregate` is {aggregate!r}, but its number must be {rule}.")
    return name, number


def json_object(text: str) -> dict[str, Any]:
    """Parses a JSON object. Raises `ValueError` for anything else."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def positive(text: str) -> int:
    """Parses a whole number of at least 1. Raises `ValueError` for anything else."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _criterion(text: str) -> str | dict[str, str]:
    if not text.lstrip().startswith("{"):
        return text
    criteria = json_object(text)
    if not all(isinstance(message, str) for message in criteria.values()):
        raise ValueError(text)
    return criteria


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


# Parser per type of setting, and a description of valid text.
READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    str: (str, "text"),
    str | None: (str, "text"),
    float: (float, "a number"),
    int: (positive, "a whole number of at least 1"),
    bool: (_boolean, "true or false"),
    JSON: (json_object, "a JSON object"),
    INIT_KWARGS: (json_object, "a JSON object"),
    CRITERION: (_criterion, "text, or a JSON object with one message, as text, for each domain"),
}


def _one_of(choices: tuple[str, ...], **default: Any) -> Any:
    return field(**{"default": choices[0], **default}, metadata={"choices": choices})


def _not_in(*places: Literal["yaml", "score", "environment"], default: Any) -> Any:
    return field(default=default, metadata={"absent": places})


@with_help
@dataclass(frozen=True)
class Settings:
    """
    Settings of [`EndogenousReward`], in the words of `--help`.

    Args:
        alpha (`float`):
            Temperature of the soft value; 1 for language models.
        gamma (`float`):
            Discount inside the Bellman operator, in (0, 1].
        token_reward (`str`):
            Form of the token rewards: 'bellman' (f(s, a) - gamma V(s')), 'log_prob' (alpha log pi), 'centered' (alpha
            (log pi + entropy)), 'negative_entropy', or 'self_certainty' (KL of the uniform distribution to pi).
        aggregate (`str`):
            How token rewards become one number: 'sum' (without V(s_1), a constant of the prompt), 'mean' (the same per
            token), 'discounted' (the sum of discount^(h-1) r_h), 'power=NUMBER' (the sum divided by H^NUMBER),
            'first=NUMBER' (the sum of that many first tokens), or 'min'.
        discount (`float`):
            Discount of the aggregate 'discounted', in (0, 1].
        truncation (`str`):
            How to treat completions without an end-of-sequence token: 'terminal' (the last token is the end),
            'bootstrap' (subtract the model's own value of the state after it), or 'skip' (no reward).
        criterion (`str` or `dict`):
            System message that tells the frozen model how to judge, or a dictionary (JSON on the command line) with
            one for each value of the column `domain`.
        max_tokens_per_batch (`int`):
            Maximum number of tokens in a forward pass of the frozen model. Limits memory, does not change rewards.
        dtype (`str`):
            Dtype of the frozen model's own copy. 'auto' is bfloat16 on accelerators and float32 on CPU, where
            commands and recipes choose the faster of the two.
        device (`str`):
            Device of the frozen model's own copy, such as cpu or cuda:1 (default: the process's own, or the best
            available).
        trust_remote_code (`bool`):
            Allow code from the model's repository to run.
        name (`str`):
            Name in logs. Two endogenous rewards of the same trainer need different names.
        overlong_prompt (`str`):
            How to treat rows longer than the frozen model's context: raise an error, or drop the beginning of the
            prompt.
        images (`str`):
            How to treat images in prompts: read them, which requires a frozen model that reads images, or judge
            completions as answers to the text alone.
        chat_template_kwargs (`dict`):
            Additional arguments of the chat template, such as {"enable_thinking": false}. In a trainer, those of the
            trainer are used by default.
        offload (`bool`):
            Whether to keep the frozen model's own copy in CPU memory between calls, at the cost of a transfer per
            call.
        model_init_kwargs (`dict`):
            Additional arguments of `from_pretrained` for the frozen model's own copy, such as {"revision": "v1",
            "quantization_config": {"load_in_4bit": true}}.
        adapter_name (`str`):
            Adapter of a `PeftModel` that makes up the frozen model (default: the active one). Other adapters may be
            trained, so a policy can have a frozen adapter as its reward.
        correction (`str`):
            Part to remove from the reward: the effect of length ('length', in training only), or what single tokens
            lose beyond a bound ('clip').
    """

    alpha: float = 1.0
    gamma: float = 1.0
    token_reward: str = _one_of(TOKEN_REWARDS)
    aggregate: str = "sum"
    discount: float = 0.95
    truncation: str = _one_of(get_args(Truncation))
    criterion: CRITERION = None
    max_tokens_per_batch: int = 8192
    dtype: str = _one_of(("auto", "bfloat16", "float16", "float32"))
    device: str | None = None
    trust_remote_code: bool = _not_in("yaml", default=False)  # the trainer's `trust_remote_code` applies
    # A recipe has one endogenous reward, `score` logs nothing, and TRL reads the name before the reward is made.
    name: str = _not_in("yaml", "score", "environment", default="endogenous_reward")
    overlong_prompt: str = _one_of(("error", "truncate_left"))
    images: str = _one_of(("read", "ignore"))
    chat_template_kwargs: JSON = _not_in("yaml", default=None)  # the trainer's `chat_template_kwargs` apply
    offload: bool = _not_in("score", default=False)  # nothing else needs the device between calls
    model_init_kwargs: INIT_KWARGS = None
    adapter_name: str | None = _not_in("yaml", "score", "environment", default=None)  # an adapter has a path
    correction: str | None = _one_of(get_args(CorrectionName), default=None)


@dataclass(frozen=True)
class RewardSetting:
    """One setting of [`EndogenousReward`]: `type` is its type in YAML, `absent` the places where it cannot be set."""

    name: str
    type: Any
    default: Any
    help: str
    choices: tuple[str, ...] | None = None
    absent: tuple[str, ...] = ()

    def read(self, text: str) -> Any:
        """Parses its value from an environment variable or a command line. Raises `ValueError`: `must be <kind>`."""
        reader, kind = READERS[self.type]
        try:
            return reader(text)
        except ValueError as error:
            raise ValueError(f"must be {kind}") from error


SETTINGS = {f.name: RewardSetting(f.name, f.type, f.default, **f.metadata) for f in fields(Settings)}
