# SPDX-License-Identifier: Apache-2.0
"""Recipe arguments besides the trainer's configuration."""

from dataclasses import dataclass, field, make_dataclass
from typing import Any, get_args

from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig, RewardConfig, ScriptArguments

from ..field_help import with_help
from ..monitoring.monitor import Action
from ..rewards.controls import FormatReward
from ..rewards.endogenous import EndogenousReward
from ..rewards.settings import SETTINGS, RewardSetting
from .parser import RecipeParser


REWARDS = ("endogenous", "sentence", "random", "length", "format")


@with_help
@dataclass
class RunArguments(ScriptArguments):
    """
    TRL's script arguments, and resumption.

    Parameters:
        resume (`bool`, *optional*, defaults to `True`):
            Whether to resume from the last complete checkpoint in `output_dir`, if there is one.
    """

    resume: bool = True


@with_help
@dataclass
class RecipeArguments(RunArguments):
    """
    Arguments of a recipe on prompts: data as in [`RunArguments`], displays of the run, and measurement of accuracy.

    `dataset_name` may also be `"quickstart"`, the factual questions that ship with endotrl (splits `train` and
    `test`), or a file: `.jsonl`, `.json`, `.csv` or `.parquet`, also compressed (`.jsonl.gz`; split `train`).

    Parameters:
        dataset_prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column with the prompts, as text or as messages.
        dataset_prompt_suffix (`str`, *optional*):
            Text appended to each prompt, or to its last message, such as an instruction on the answer's format.
        dataset_prompt_chat (`bool`, *optional*, defaults to `False`):
            Whether to turn text prompts into user messages, for the chat template.
        dataset_overlong (`str`, *optional*, defaults to `"error"`):
            What to do with prompts that, together with a completion of `max_completion_length`, exceed the context of
            the policy or of a frozen model: raise an `"error"`, or `"drop"` them.
        heat_map_steps (`int`, *optional*, defaults to `0`):
            Number of steps between two heat maps of completions, coloured by token reward, in
            `output_dir/completions` and on W&B. 0 disables them.
        on_collapse (`str`, *optional*, defaults to `"warn"`):
            What [`CollapseMonitor`] does when the run collapses: `"warn"`, `"stop"`, or `"restore"` the best
            checkpoint. `"none"` disables it.
        accuracy (`str`, *optional*, defaults to `"auto"`):
            How to grade final answers for the logged accuracy ([`AccuracyReward`] with weight 0): `"math"` compares
            expressions with math-verify, `"match"` compares text, and `"none"` logs no accuracy. `"auto"` is `"math"`
            for a column `solution` or `answer` if math-verify is installed, `"match"` if it is not and for a column
            `answers`, and `"none"` without any of these columns.
        answer_column (`str`, *optional*):
            Column with the right answer, or with a list of accepted answers. Defaults to the first of `solution`,
            `answer` and `answers` that exists.
    """

    dataset_prompt_column: str = "prompt"
    dataset_prompt_suffix: str | None = None
    dataset_prompt_chat: bool = False
    dataset_overlong: str = field(default="error", metadata={"choices": ["error", "drop"]})
    heat_map_steps: int = 0
    on_collapse: str = field(default="warn", metadata={"choices": [*get_args(Action), "none"]})
    accuracy: str = field(default="auto", metadata={"choices": ["auto", "math", "match", "none"]})
    answer_column: str | None = None


def _field(setting: RewardSetting) -> tuple[str, Any, Any]:
    metadata = {"help": setting.help, **({"choices": list(setting.choices)} if setting.choices else {})}
    return f"reward_{setting.name}", setting.type, field(default=setting.default, metadata=metadata)


_IN_YAML = [setting for setting in SETTINGS.values() if "yaml" not in setting.absent]
_EndogenousSettings: Any = make_dataclass("_EndogenousSettings", map(_field, _IN_YAML))


@with_help
@dataclass
class RewardArguments(_EndogenousSettings):
    r"""
    Training rewards. `reward_<setting>` (`reward_alpha`, `reward_aggregate`, ...) is that setting of
    [`EndogenousReward`]: see [`~endotrl.rewards.settings`].

    Parameters:
        reward (`list[str]`, *optional*, defaults to `["endogenous"]`):
            Rewards, weighted by the trainer's `reward_weights`: `"endogenous"`; `"sentence"`, a trained sentence-level
            reward model; the controls `"random"`, `"length"` (shorter is better) and `"format"`; or the dotted path of
            a custom reward function, as in TRL.
        reward_model (`str`, *optional*):
            Frozen model of the endogenous reward: a path or hub id of a model or an adapter, the URL of a server, or
            `"quickstart"`. Defaults to the policy before training, which needs no second copy if the trainer holds its
            weights anyway (LoRA, or `beta` > 0 without ZeRO-3 and FSDP). If set, the reward always loads its own copy.
        reward_shard (`bool`, *optional*, defaults to `True`):
            Whether to shard the frozen weights over the processes if the policy's are (DeepSpeed ZeRO-3, FSDP2), and
            to gather them for each call. Otherwise, every process holds all of them.
        reward_sentence_model (`str`, *optional*):
            Sentence-level reward model of the reward `"sentence"`: a path or hub id.
        reward_pattern (`str`, *optional*, defaults to a non-empty `\boxed{...}`):
            Regular expression that the reward `"format"` searches for.

    Raises:
        `ValueError`: If a value is out of range or unknown.
    """

    reward: list[str] = field(default_factory=lambda: ["endogenous"])
    reward_model: str | None = None
    reward_shard: bool = True
    reward_sentence_model: str | None = None
    reward_pattern: str = FormatReward.BOXED

    def __post_init__(self) -> None:
        if not self.reward:
            raise ValueError("`reward` is empty, so there is nothing to train on. Name at least one reward.")
        for name in self.reward:
            if name not in REWARDS and "." not in name:
                raise ValueError(
                    f"Unknown reward {name!r} in `reward`. Use one of {', '.join(map(repr, REWARDS))}, or the dotted "
                    "path of a reward function, such as 'my_rewards.brevity'."
                )
        if "sentence" in self.reward and self.reward_sentence_model is None:
            raise ValueError(
                "The reward 'sentence' requires `reward_sentence_model`. Train a model with "
                "recipes/sentence_reward.py, and set it to the model's path."
            )
        try:  # without weights: only the checks
            EndogenousReward(None, **self.endogenous_settings)
            FormatReward(self.reward_pattern)
        except ValueError as error:
            raise ValueError(f"Invalid `reward_...` setting: {error}") from error

    @property
    def endogenous_settings(self) -> dict[str, Any]:
        """Arguments of [`EndogenousReward`], except the model."""
        settings = {setting.name: getattr(self, f"reward_{setting.name}") for setting in _IN_YAML}
        kwargs = settings["model_init_kwargs"]
        if isinstance(kwargs, str):  # from the command line
            settings["model_init_kwargs"] = SETTINGS["model_init_kwargs"].read(kwargs)
        return settings


def make_parser(training_config: type[GRPOConfig | RewardConfig]) -> RecipeParser:
    """
    Parser of a recipe's command line and YAML file (`--config`), with [`RecipeArguments`], `training_config`,
    [`RewardArguments`], [`~trl.ModelConfig`] and [`~trl.DatasetMixtureConfig`]; for a reward model, with
    [`RunArguments`] instead of the first, and without [`RewardArguments`].
    """
    if issubclass(training_config, RewardConfig):
        return RecipeParser((RunArguments, training_config, ModelConfig, DatasetMixtureConfig))
    return RecipeParser((RecipeArguments, training_config, RewardArguments, ModelConfig, DatasetMixtureConfig))
