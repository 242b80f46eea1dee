# SPDX-License-Identifier: Apache-2.0
"""The endogenous reward as a TRL reward function."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .._moved import accept_positional
from ..checks import check_criterion
from ..frozen.served import ServedModel, is_url
from ..rendering.images import Images
from ..rendering.messages import Completions, Prompts, TokenIds
from ..rendering.offsets import decode_with_offsets
from ..rendering.policy import foreign_token_ids
from ..rendering.renderer import OverlongPrompt, Rendered
from ..scoring.token_stats import TokenStats
from .corrections import Correction, InformationGain, LengthControl, length_shares, length_slope
from .frozen_model_reward import FrozenModelReward
from .protocol import DenseScores, check_same_tokens
from .rule import RewardRule, log_batch
from .scored import ScoredCompletions
from .settings import CorrectionName, TokenReward, Truncation


if TYPE_CHECKING:
    from .reward_model_adapter import RewardModelAdapter


# Earlier versions take an instance with an `async` `__call__` for a plain function and never await it.
TRL_AWAITS_INSTANCES = Version(version("trl")) >= Version("1.14")


class EndogenousReward(FrozenModelReward):
    r"""
    The reward that is already contained in a language model (EndoRM, https://huggingface.co/papers/2506.23235): the
    logits of a frozen model, read as a soft Q-function, give every token the reward

    $$
    r(s_h, a_h) = f(s_h, a_h) - \gamma V(s_{h+1}), \qquad V(s) = \alpha \log \sum_a \exp(f(s, a) / \alpha),
    $$

    and a whole response, with the default settings, $\alpha \log \hat\pi(y|x)$ (eq. 11 and 12). It needs no reward
    model, judge or labels, and is a reward function for TRL's `GRPOTrainer`, `RLOOTrainer` and `OnlineDPOTrainer`.

    Train with `beta` > 0: the optimum is $\hat\pi(y|x)^{1 + \alpha/\beta}$, normalised. With `beta=0`, it collapses to
    the most probable response.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`ServedModel`], *optional*):
            Frozen model: a path or hub id of a model or of a PEFT adapter, from which the reward loads its own copy on
            first use; `"quickstart"` for the demo's model; the URL of a server, such as `"http://host:8000/v1"`
            ([`ServedModel`]); or a loaded model or [`~peft.PeftModel`], which is used directly and must not be
            trained. With `None`, the reward shares the frozen weights of a trainer: see [`attach`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            As in [`FrozenModelReward`].
        alpha, gamma, token_reward, aggregate, discount, truncation, criterion, max_tokens_per_batch, dtype, device,
        trust_remote_code, name, overlong_prompt, images, chat_template_kwargs, offload, model_init_kwargs,
        adapter_name:
            See [`~endotrl.rewards.settings.Settings`]. `truncation="skip"` returns `None` for truncated completions.
            If there are other reward functions, TRL treats it as 0, which is above any log-probability, unless
            `multi_objective_aggregation="normalize_then_sum"`.
        correction (`str` or [`Correction`], *optional*):
            Part that is removed from the reward: `"length"` ([`LengthControl`]), the effect of length; `"clip"`
            ([`ClipTokens`]), token rewards beyond a bound; or an [`InformationGain`].

    Raises:
        `ValueError`: If a setting is out of range or unknown, or not supported by a server.
        `OSError`: If there is no model of that name.

    Example:
    ```python
    >>> from endotrl import EndogenousReward

    >>> reward = EndogenousReward("quickstart")
    >>> prompts = [[{"role": "user", "content": "What is the capital of France?"}]] * 2
    >>> answers = ["The capital of France is Paris.", "The capital of France is Rome."]
    >>> completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    >>> paris, rome = reward(prompts=prompts, completions=completions)
    >>> paris > rome
    True
    ```
    """

    # The settings of the rule, as attributes.
    alpha = property(attrgetter("rule.alpha"))
    gamma = property(attrgetter("rule.gamma"))
    token_reward = property(attrgetter("rule.token_reward"))
    aggregate = property(attrgetter("rule.aggregate"))
    discount = property(attrgetter("rule.discount"))
    truncation = property(attrgetter("rule.truncation"))
    correction = property(attrgetter("rule.correction"))
    length_slope = 0.0  # removed from the last batch by [`LengthControl`]

    @accept_positional
    def __init__(
        self,
        model: str | PreTrainedModel | ServedModel | None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        *,
        alpha: float = 1.0,
        gamma: float = 1.0,
        token_reward: TokenReward = "bellman",
        aggregate: str = "sum",
        discount: float = 0.95,
        truncation: Truncation = "terminal",
        criterion: str | Mapping[str, str] | None = None,
        max_tokens_per_batch: int = 8192,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        name: str = "endogenous_reward",
        overlong_prompt: OverlongPrompt = "error",
        images: Images = "read",
        chat_template_kwargs: dict[str, Any] | None = None,
        offload: bool = False,
        model_init_kwargs: dict[str, Any] | None = None,
        adapter_name: str | None = None,
        correction: Correction | CorrectionName | None = None,
    ) -> None:
        self.rule = RewardRule(token_reward, aggregate, discount, alpha, gamma, truncation, correction)
        self.criterion = check_criterion(criterion)
        placement: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        placement |= {"max_tokens_per_batch": max_tokens_per_batch, "offload": offload}
        own: dict[str, Any] = {"model_init_kwargs": model_init_kwargs, "adapter_name": adapter_name}
        own |= {"overlong_prompt": overlong_prompt, "chat_template_kwargs": chat_template_kwargs, "images": images}
        super().__init__(model, processing_class, name, **placement, **own)
        asynchronous = isinstance(self._placement, ServedModel) and self._placement.asynchronous
        if type(self) is EndogenousReward and asynchronous and TRL_AWAITS_INSTANCES:
            self.__class__ = AsyncEndogenousReward  # TRL looks for `async def __call__` in the class
        self._generalist: EndogenousReward | None = None
        if isinstance(self.correction, InformationGain):
            other = self.correction.generalist
            # The tokenizer of a loaded or served model cannot always be found, so ours is used.
            tokenizer = None if isinstance(other, str) and not is_url(other) else processing_class
            self._generalist = EndogenousReward(other, tokenizer, token_reward="log_prob", alpha=alpha, **placement)

    def __repr__(self) -> str:
        where = "not attached to a trainer yet" if self._placement is None else self._placement.description
        rule = str(self.rule).removeprefix("RewardRule(").removesuffix(")")
        return f"EndogenousReward({where}, {rule}, name={self.__name__!r})"

    def __call__(
        self, prompts: Prompts, completions: Completions, completion_ids: TokenIds | None = None, **kwargs: Any
    ) -> list[float | None]:
        """
        One reward per completion: TRL's contract for reward functions.

        Args:
            prompts, completions (`list[str]` or `list[list[dict]]`), completion_ids (`list[list[int]]`, *optional*):
                Text or messages, and the token ids that the policy generated, including EOS, without padding. The ids
                are scored unchanged if they belong to the frozen model's tokenizer; otherwise, or if they are not
                given, the text is encoded.
            **kwargs:
                Columns: `domain`, which selects the criterion if there are several; `image` (one per row) or `images`
                (a list per row), see [`place_images`]; `environment`; and, outside of trainers, `tools` and
                `chat_template_kwargs` of each row. And TRL's loggers: `log_extra` for the reward per token,
                `log_metric` for the metrics of [`batch_diagnostics`].

        Returns:
            `list[float | None]`: `None` for completions without a scored token or excluded by `truncation="skip"`.

        Raises:
            `ValueError`, `TypeError`: For a batch that cannot be rendered (see [`Renderer.render`]), and for NaN
            logits. `RuntimeError`: If the reward shares a trainer's weights and is not attached.
        """
        return self._score_and_log(self._render(prompts, completions, completion_ids, kwargs), kwargs)[1]

    def outcome_and_token_rewards(
        self, prompts: Prompts, completions: Completions, completion_ids: TokenIds | None = None, **kwargs: Any
    ) -> DenseScores:
        r"""
        Rewards per completion and per token (see [`DenseReward`]), from the arguments of [`__call__`].

        The token rewards are those of [`token_rewards`] times their weights in the aggregate, plus, with
        [`LengthControl`], each token's share of the correction. They sum to the outcome, plus $V(s_1)$ for `"bellman"`
        rewards unless discounted. State values are $V(s_h)$ times the same weights for `"bellman"` rewards, and `None`
        for other forms.

        Raises `ValueError` for an aggregate that is not a sum of token rewards (`"mean"`, `"power"`, `"min"`), and if
        the frozen model and the policy have different tokenizers.
        """
        self.check_token_credit()
        rows = self._render(prompts, completions, completion_ids, kwargs)
        check_same_tokens(rows, completion_ids)
        stats, outcomes = self._score_and_log(rows, kwargs)
        rewards = [self.rule.token_rewards(row) for row in stats]
        weights = [self.rule.weights(own).float() for own in rewards]
        token_rewards = [
            row.on_all_tokens(weight * own + length_shares(len(own), self.length_slope))
            for row, weight, own in zip(stats, weights, rewards, strict=True)
        ]
        if self.token_reward != "bellman":
            return DenseScores(outcomes, token_rewards)
        values = [row.on_all_tokens(w * row.soft_values[:-1]) for row, w in zip(stats, weights, strict=True)]
        return DenseScores(outcomes, token_rewards, values)

    def check_token_credit(self) -> None:
        """Raises `ValueError` if the outcome is not a sum of token rewards, or if a server cannot provide them."""
        self.rule.check_token_credit()
        self._check_token_rewards()

    def _check_token_rewards(self) -> None:
        if self.is_served and self.token_reward == "bellman":
            raise ValueError(
                "Bellman rewards of single tokens contain soft values V of the logits, but the frozen model is on a "
                'server, which only returns log-probabilities. Use `token_reward="log_prob"`: its sum is the same.'
            )

    def _score_and_log(
        self, rows: list[Rendered], columns: Mapping[str, Any]
    ) -> tuple[list[TokenStats], list[float | None]]:
        """Statistics and rewards of a batch."""
        log_extra, log_metric = columns.get("log_extra"), columns.get("log_metric")
        stats = self._score_rows(rows, entropy=log_metric is not None)
        rewards = [self.rule.outcome(row) for row in stats]
        if isinstance(self.correction, LengthControl):
            lengths = [len(row.token_ids) for row in stats]
            self.length_slope = length_slope(rewards, lengths, [row.prompt for row in rows])
            rewards = [
                None if reward is None else reward - self.length_slope * math.log(length)
                for reward, length in zip(rewards, lengths, strict=True)
            ]
            if log_metric is not None:
                log_metric(f"{self.__name__}/length_slope", self.length_slope)
        if log_extra is not None or log_metric is not None:
            log_batch(self.__name__, self.rule, rewards, stats, log_extra, log_metric)
        return stats, rewards

    def token_rewards(
        self,
        prompts: Prompts,
        completions: Completions,
        completion_ids: TokenIds | None = None,
        domain: Sequence[str] | None = None,
        images: Sequence[Sequence[Any] | None] | None = None,
    ) -> list[Tensor]:
        """
        Rewards per token, from the arguments of [`__call__`]: one tensor of shape `(H_i,)` per completion, float32, on
        the CPU; 0 where a tool wrote, NaN for completions excluded by `truncation="skip"`. By default, they sum to the
        reward plus $V(s_1)$.
        """
        self._check_token_rewards()
        rows = self._render(prompts, completions, completion_ids, {"domain": domain, "images": images})
        return [self.token_rewards_from(row) for row in self._score_rows(rows, entropy=False)]

    def score(
        self,
        prompts: Prompts,
        completions: Completions,
        completion_ids: TokenIds | None = None,
        domain: Sequence[str] | None = None,
        progress: bool = False,
        images: Sequence[Sequence[Any] | None] | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Sequence[Any] | None = None,
    ) -> ScoredCompletions:
        """
        Token statistics of completions, for [`token_rewards_from`] and [`aggregate_from`], from the arguments of
        [`__call__`].
        """
        columns = {"domain": domain, "images": images, "tools": tools, "chat_template_kwargs": chat_template_kwargs}
        rows = self._render(prompts, completions, completion_ids, columns)
        scored = self._score_rows(rows, entropy=True, progress=progress)
        for i, row in enumerate(rows):
            text, offsets = decode_with_offsets(self._tokenizer, row.completion_ids)
            scored[i] = replace(scored[i], text=text, offsets=[offsets[position] for position in row.action_positions])
        return ScoredCompletions(scored, self, prompts, images)

    def token_rewards_from(self, stats: TokenStats) -> Tensor:
        """Token rewards of a scored completion, of shape `(H,)`, 0 where a tool wrote."""
        self._check_token_rewards()
        return stats.on_all_tokens(self.rule.token_rewards(stats))

    def aggregate_from(self, stats: TokenStats) -> float | None:
        """Reward of a scored completion: see [`RewardRule.outcome`]."""
        return self.rule.outcome(stats)

    def as_reward_model(self) -> "RewardModelAdapter":
        """This reward as the `reward_model` of TRL's own PPO trainer, up to TRL 1.12: see [`RewardModelAdapter`]."""
        from .reward_model_adapter import RewardModelAdapter  # imports `trl.experimental`, which few users need

        return RewardModelAdapter(self)

    def _score_rows(self, rows: list[Rendered], entropy: bool, progress: bool = False) -> list[TokenStats]:
        generalist = self._generalist
        if generalist is None:
            return super()._score_rows(rows, entropy, progress)
        if foreign_token_ids(generalist._tokenizer, self._tokenizer) != frozenset():
            raise ValueError(
                f"The generalist {generalist.config._name_or_path!r} and the frozen model "
                f"{self.config._name_or_path!r} have different tokenizers, so their log-probabilities belong to "
                "different tokens. Use two models of the same family."
            )
        pairs = super()._score_rows(rows, entropy, progress), generalist._score_rows(rows, False, progress)
        return [replace(row, generalist_log_probs=other.log_probs) for row, other in zip(*pairs, strict=True)]


class AsyncEndogenousReward(EndogenousReward):
    """
    Class of `EndogenousReward("http://...")`: the same, but with an `async` `__call__`. While the server works, TRL's
    GRPO and RLOO trainers run other reward functions. See [`ServedModel`].
    """

    async def __call__(  # type: ignore[override]
        self, prompts: Prompts, completions: Completions, *args: Any, **kwargs: Any
    ) -> list[float | None]:
        """Awaitable version of [`EndogenousReward.__call__`]."""
        return await asyncio.to_thread(partial(super().__call__, prompts, completions, *args, **kwargs))
