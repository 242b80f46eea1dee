# SPDX-License-Identifier: Apache-2.0
"""The endogenous reward as a TRL reward function."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..bellman import (
    Aggregate,
    Contributions,
    TokenRewardForm,
    aggregate_weights,
    bellman_contributions,
    outcome_reward,
    token_rewards,
)
from ..checks import check_alpha, check_choice, check_discount
from ..rendering.messages import Completion, Prompt, criteria_of_rows
from ..rendering.offsets import decode_with_offsets
from ..rendering.renderer import OverlongPrompt, Rendered
from ..scoring.token_stats import TokenStats
from .base import FrozenModelReward
from .corrections import (
    Correction,
    CorrectionName,
    InformationGain,
    LengthControl,
    as_correction,
    correct_tokens,
    length_shares,
    length_slope_sums,
)
from .diagnostics import batch_diagnostics
from .protocol import DenseScores


if TYPE_CHECKING:
    from .reward_model_adapter import RewardModelAdapter


Truncation = Literal["terminal", "bootstrap", "skip"]


class EndogenousReward(FrozenModelReward):
    r"""
    The reward that a language model already contains (EndoRM, https://huggingface.co/papers/2506.23235): the logits of
    a frozen model, read as a soft Q-function, give every token the reward

    $$
    r(s_h, a_h) = f(s_h, a_h) - \gamma V(s_{h+1}), \qquad V(s) = \alpha \log \sum_a \exp(f(s, a) / \alpha),
    $$

    and a whole response, with the default settings, $\alpha \log \hat\pi(y|x)$ (eq. 11 and 12). It needs no reward
    model, judge or labels, and plugs into TRL's `GRPOTrainer`, `RLOOTrainer` and `OnlineDPOTrainer` as a reward
    function.

    Train with a KL penalty (`beta` > 0): the optimum is then $\hat\pi(y|x)^{1 + \alpha/\beta}$, normalised. Without one,
    the policy collapses onto its most probable response.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Frozen model: a path or hub id, from which the reward loads its own copy on first use; `"quickstart"` for
            the demo's model; or a loaded model, which is used as it is and must not be trained. With `None`, the reward
            shares the frozen weights of a trainer and must be attached to it: see [`attach`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of `model`, or a processor that holds it. Loaded with the model if not given. In a trainer whose policy
            has the same tokenizer, prompts are read as the policy reads them: a chat template of another
            `processing_class` holds, with a warning.
        alpha (`float`, *optional*, defaults to `1.0`):
            Temperature of the soft value. Pretrained and fine-tuned language models have `1.0`.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount inside the operator, in $(0, 1]$.
        token_reward (`str`, *optional*, defaults to `"bellman"`):
            Form of the token rewards: `"bellman"`, $f(s, a) - \gamma V(s')$; `"log_prob"`, $\alpha \log \hat\pi$;
            `"centered"`, $\alpha (\log \hat\pi + \mathcal{H})$.
        aggregate (`str`, *optional*, defaults to `"sum"`):
            How token rewards become one number: `"sum"` (without $V(s_1)$, a constant of the prompt), `"mean"` (the same
            by token), or `"discounted"`, $\sum_h \delta^{h-1} r_h$.
        discount (`float`, *optional*, defaults to `0.95`):
            $\delta$ of `aggregate="discounted"`, in $(0, 1]$.
        truncation (`str`, *optional*, defaults to `"terminal"`):
            Completions without EOS: `"terminal"` takes the state after the last token for the end, $V(s_{H+1}) = 0$;
            `"bootstrap"` subtracts the model's own value of it; `"skip"` gives no reward (`None`). Next to other reward
            functions, TRL takes `None` for 0, more than any log-probability: then use `"skip"` only with
            `multi_objective_aggregation="normalize_then_sum"`.
        criterion (`str` or `dict[str, str]`, *optional*):
            System message under which the frozen model judges; the policy does not see it. A dictionary gives one for
            each value of the dataset's column `domain`.
        max_tokens_per_batch (`int`, *optional*, defaults to `8192`):
            Tokens of one forward pass: see [`FrozenScorer`]. It bounds memory and does not change rewards.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Dtype of the reward's own copy: `"auto"` is bfloat16 on accelerators and float32 on CPU.
        device (`str` or `torch.device`, *optional*):
            Device of the reward's own copy. Defaults to this process's device, as `accelerate` gives it.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the model's repository may run.
        name (`str`, *optional*, defaults to `"endogenous_reward"`):
            Name in logs. Give two endogenous rewards in one trainer different names.
        overlong_prompt (`str`, *optional*, defaults to `"error"`):
            What to do when prompt and completion do not fit the frozen model's context: `"error"`, or
            `"truncate_left"` to drop the beginning of the prompt.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further arguments for the chat template. In a trainer, its own are taken over: see [`bind`].
        offload (`bool`, *optional*, defaults to `False`):
            Whether the reward's own copy waits in CPU memory between calls, which frees the accelerator's for training
            and costs a transfer of the weights a call.
        correction (`str` or [`Correction`], *optional*):
            What is taken out of the reward: `"length"` or a [`LengthControl`], what length explains; `"clip"` or a
            [`ClipTokens`], what single tokens lose or gain beyond a bound; an [`InformationGain`], what another model
            knows too.

    Raises:
        `ValueError`: If a setting is out of range or unknown.
        `OSError`: If there is no model of that name.

    Example:
    ```python
    >>> from endotrl import EndogenousReward

    >>> reward = EndogenousReward("quickstart")
    >>> prompts = [[{"role": "user", "content": "What is the capital of France?"}]] * 2
    >>> completions = [
    ...     [{"role": "assistant", "content": "The capital of France is Paris."}],
    ...     [{"role": "assistant", "content": "The capital of France is Rome."}],
    ... ]
    >>> paris, rome = reward(prompts=prompts, completions=completions)
    >>> paris > rome
    True
    ```
    """

    def __init__(
        self,
        model: str | PreTrainedModel | None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        alpha: float = 1.0,
        gamma: float = 1.0,
        token_reward: TokenRewardForm = "bellman",
        aggregate: Aggregate = "sum",
        discount: float = 0.95,
        truncation: Truncation = "terminal",
        criterion: str | Mapping[str, str] | None = None,
        max_tokens_per_batch: int = 8192,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        name: str = "endogenous_reward",
        overlong_prompt: OverlongPrompt = "error",
        chat_template_kwargs: dict[str, Any] | None = None,
        offload: bool = False,
        correction: Correction | CorrectionName | None = None,
    ) -> None:
        check_alpha(alpha)
        check_discount("gamma", gamma)
        check_discount("discount", discount)
        check_choice("token_reward", token_reward, get_args(TokenRewardForm))
        check_choice("aggregate", aggregate, get_args(Aggregate))
        check_choice("truncation", truncation, get_args(Truncation))
        check_choice("overlong_prompt", overlong_prompt, get_args(OverlongPrompt))
        texts = list(criterion.values()) if isinstance(criterion, Mapping) else [criterion]
        if not all(isinstance(text, str) or (text is None and criterion is None) for text in texts):
            raise TypeError(
                f"`criterion` is {criterion!r}, but it must be a string, a dictionary with one string for each domain, or `None`."
            )
        super().__init__(
            model,
            processing_class,
            name,
            max_tokens_per_batch=max_tokens_per_batch,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            overlong_prompt=overlong_prompt,
            chat_template_kwargs=chat_template_kwargs,
            offload=offload,
        )
        self.alpha, self.gamma = alpha, gamma
        self.token_reward, self.aggregate, self.discount = token_reward, aggregate, discount
        self.truncation = truncation
        self.criterion = criterion
        self.correction = as_correction(correction, token_reward)
        self._length_sums = (0.0, 0.0)
        self.length_slope = 0.0  # that [`LengthControl`] took out of the last batch
        self._generalist: EndogenousReward | None = None
        if isinstance(self.correction, InformationGain):
            if self.correction.generalist is None:
                raise ValueError(
                    "The `generalist` of `InformationGain` is None, but it must be a path, a hub id or a loaded model: no trainer "
                    "has one to share."
                )
            self._generalist = EndogenousReward(
                self.correction.generalist,
                # Of a loaded model, the tokenizer cannot always be found.
                processing_class if isinstance(self.correction.generalist, PreTrainedModel) else None,
                alpha=alpha,
                max_tokens_per_batch=max_tokens_per_batch,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                offload=offload,
            )

    def __repr__(self) -> str:
        where = "not attached to a trainer yet" if self._placement is None else self._placement.description
        return (
            f"EndogenousReward({where}, alpha={self.alpha}, gamma={self.gamma}, token_reward={self.token_reward!r}, "
            f"aggregate={self.aggregate!r}, truncation={self.truncation!r}, correction={self.correction!r}, "
            f"name={self.__name__!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        correction = self.correction
        if isinstance(correction, InformationGain) and isinstance(correction.generalist, PreTrainedModel):
            # Only its name is kept here; `_generalist` scores, and answers for its weights.
            state["correction"] = replace(correction, generalist=correction.generalist.config._name_or_path)
        return state

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        domain: Sequence[str] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """
        One reward a completion: TRL's contract for reward functions.

        Args:
            prompts (`list[str]` or `list[list[dict]]`):
                Prompts, as text or as messages.
            completions (`list[str]` or `list[list[dict]]`):
                Completions.
            completion_ids (`list[list[int]]`, *optional*):
                Token ids of the completions as the policy generated them, EOS included, without padding. Scored as
                they are if they are of the frozen model's tokenizer; otherwise, or if not given, the text is encoded.
            domain (`list[str]`, *optional*):
                Column of the dataset that selects the criterion, if `criterion` is a dictionary.
            log_extra (`Callable`, *optional*), log_metric (`Callable`, *optional*):
                TRL's loggers. Columns: reward per token. Metrics: reward, log-probability and entropy per token (nats),
                the fraction of truncated completions, and the correlation of the reward with the length.
            **kwargs:
                Other columns. `environment` selects tools, where the trainer has several environments.

        Returns:
            `list[float | None]`: `None` for a completion without a scored token, and for truncated ones with
            `truncation="skip"`.

        Raises:
            `ValueError`, `TypeError`: For a batch that cannot be rendered (before anything is computed; see
            [`Renderer.render`]), and for NaN logits.
            `RuntimeError`: If the reward shares a trainer's weights and is not attached.
        """
        rows = self._rows(prompts, completions, completion_ids, domain, log_extra, kwargs.get("environment"))
        return self._score_and_log(rows, log_extra, log_metric)[1]

    def outcome_and_token_rewards(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        domain: Sequence[str] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> DenseScores:
        r"""
        What [`__call__`] gives, and what each token contributed to it, for trainers that credit tokens: see
        [`DenseReward`].

        Args:
            prompts, completions, completion_ids, domain, log_extra, log_metric, **kwargs:
                As in [`__call__`].

        Returns:
            [`DenseScores`]. The token rewards are those of [`token_rewards`], and with `aggregate="discounted"`
            $\delta^{h-1}$ times them, with [`LengthControl`] plus the share of each in the correction: they sum to the
            outcome, plus $V(s_1)$ for `aggregate="sum"` and `"bellman"` rewards. The state values of `"bellman"`
            rewards are $V(s_h)$, times the same weight; other forms have none.

        Raises:
            `ValueError`: With `aggregate="mean"`, which no sum of token rewards is: what a token adds to a mean depends
            on tokens to come. If the frozen model has another tokenizer than the policy, so that its token rewards are
            of other tokens. And as [`__call__`].
        """
        self.check_token_credit()
        rows = self._rows(prompts, completions, completion_ids, domain, log_extra, kwargs.get("environment"))
        for i, (row, given) in enumerate(zip(rows, completion_ids or [], strict=completion_ids is not None)):
            if row.completion_ids != list(given):
                raise ValueError(
                    f"The completion of row {i} was encoded again for the frozen model, into {len(row.completion_ids)} "
                    f"tokens in place of {len(given)}, so its token rewards are of other tokens than the policy's. Use a "
                    "frozen model with the policy's tokenizer and chat template, or credit the outcome."
                )
        stats, outcomes, slope = self._score_and_log(rows, log_extra, log_metric)
        token_rewards = [
            row.on_all_tokens(
                self._weights(row) * self._action_rewards(row) + length_shares(len(row.token_ids), slope)
            )
            for row in stats
        ]
        if self.token_reward != "bellman":
            return DenseScores(outcomes, token_rewards)
        values = [row.on_all_tokens(self._weights(row) * row.soft_values[:-1]) for row in stats]
        return DenseScores(outcomes, token_rewards, values)

    def check_token_credit(self) -> None:
        """Raises `ValueError` if the reward is no sum of token rewards."""
        if self.aggregate == "mean":
            raise ValueError(
                '`aggregate="mean"` cannot be credited to single tokens, because the weight of a token, one over the '
                'length, depends on tokens to come. Use `aggregate="sum"` or `"discounted"`, or credit the outcome.'
            )

    def _score_and_log(
        self,
        rows: list[Rendered],
        log_extra: Callable[[str, list[Any]], None] | None,
        log_metric: Callable[[str, float], None] | None,
    ) -> tuple[list[TokenStats], list[float | None], float]:
        """Statistics and rewards of a batch, and the slope that [`LengthControl`] took out of them."""
        need_entropy = self.token_reward == "centered" or log_metric is not None
        stats = self._score_rows(rows, entropy=need_entropy)
        rewards, slope = self._outcomes(rows, stats, learn=not _is_evaluation(log_metric))
        if log_extra is not None or log_metric is not None:
            # Whatever the aggregate is, so that runs with different ones can be compared.
            per_token = [self._outcome(row, "mean") for row in stats]
            if log_extra is not None:
                log_extra(f"{self.__name__}/per_token", per_token)
            if log_metric is not None:
                for key, value in batch_diagnostics(rewards, per_token, stats).items():
                    log_metric(f"{self.__name__}/{key}", value)
                if self.correction is not None:
                    plain = [self._outcome(row, self.aggregate, corrected=False) for row in stats]
                    changes = [r - p for r, p in zip(rewards, plain, strict=True) if r is not None and p is not None]
                    if changes:
                        log_metric(f"{self.__name__}/correction", sum(changes) / len(changes))
                if isinstance(self.correction, LengthControl):
                    log_metric(f"{self.__name__}/length_slope", slope)
        return stats, rewards, slope

    def _outcomes(
        self, rows: list[Rendered], stats: list[TokenStats], learn: bool
    ) -> tuple[list[float | None], float]:
        """
        Rewards of a batch, with what only a batch can correct, and the slope that this took: 0 without [`LengthControl`]. With
        `learn`, later batches remember this one.
        """
        outcomes = [self.aggregate_from(row) for row in stats]
        if not isinstance(self.correction, LengthControl):
            return outcomes, 0.0
        lengths = [len(row.token_ids) for row in stats]
        sums = length_slope_sums(outcomes, lengths, [tuple(row.prompt_ids) for row in rows])
        xy, xx = (self.correction.decay * old + new for old, new in zip(self._length_sums, sums, strict=True))
        if learn:
            self._length_sums = (xy, xx)
        slope = xy / xx if xx > 0 else 0.0  # all lengths are the same
        self.length_slope = slope
        corrected = [
            None if outcome is None else outcome - slope * math.log(length)
            for outcome, length in zip(outcomes, lengths, strict=True)
        ]
        return corrected, slope

    def state_dict(self) -> dict[str, Any]:
        """
        What it has learned from batches, with `correction="length"`: for checkpoints of [`DenseGRPOTrainer`] and
        [`PPOTrainer`].
        """
        return {"length_sums": self._length_sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken."""
        self._length_sums = state_dict["length_sums"]

    def _weights(self, stats: TokenStats) -> Tensor:
        """Weight of each token reward in the aggregate, of shape `(H,)`, float32."""
        return aggregate_weights(len(stats.token_ids), self.aggregate, self.discount).float()

    @property
    def step_discount(self) -> float:
        """Weight of a token reward in the aggregate, in units of that of the token before it."""
        return self.discount if self.aggregate == "discounted" else 1.0

    def token_rewards(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        domain: Sequence[str] | None = None,
    ) -> list[Tensor]:
        """
        One reward a token.

        Args:
            prompts, completions, completion_ids, domain:
                As in [`__call__`].

        Returns:
            `list[torch.Tensor]`, one of shape `(H_i,)` a completion, float32, on the CPU. Tokens that a tool wrote get
            0. With the default settings the rewards of a completion sum to its reward plus $V(s_1)$. With
            `truncation="skip"`, those of a truncated completion are NaN.
        """
        stats = self._score_rows(
            self._rows(prompts, completions, completion_ids, domain), entropy=self.token_reward == "centered"
        )
        return [self.token_rewards_from(row) for row in stats]

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        domain: Sequence[str] | None = None,
        progress: bool = False,
        mean_logits: bool = False,
    ) -> list[TokenStats]:
        """
        All that the frozen model says about each completion, for looking at: chosen logits, soft values, entropies,
        the decoded text and the characters of each token.

        Args:
            prompts, completions, completion_ids, domain:
                As in [`__call__`].
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.
            mean_logits (`bool`, *optional*, defaults to `False`):
                Whether to compute the mean of the logits over the vocabulary at every token, too.

        Returns:
            `list[TokenStats]`, in the order given. [`token_rewards_from`] and [`aggregate_from`] turn them into
            rewards.
        """
        rows = self._rows(prompts, completions, completion_ids, domain)
        results = []
        scored = self._score_rows(rows, entropy=True, mean_logits=mean_logits, progress=progress)
        for row, stats in zip(rows, scored, strict=True):
            text, offsets = decode_with_offsets(self._tokenizer, row.completion_ids)
            spans = [offsets[position] for position in row.action_positions]
            results.append(replace(stats, text=text, offsets=spans))
        return results

    def token_rewards_from(self, stats: TokenStats) -> Tensor:
        """Token rewards of a scored completion, of shape `(H,)`: one a token of the completion, 0 where a tool wrote."""
        return stats.on_all_tokens(self._action_rewards(stats))

    def aggregate_from(self, stats: TokenStats) -> float | None:
        """
        Reward of a scored completion, as the aggregate of its token rewards; `None` if it has none. Without
        [`LengthControl`], which needs the batch.
        """
        return self._outcome(stats, self.aggregate)

    def contributions_from(self, stats: TokenStats) -> Contributions | None:
        r"""
        What each token of a scored completion contributes to its reward: the numbers that sum to [`aggregate_from`], and that
        heat maps colour. `None` if it has no reward.

        For `"bellman"` rewards with the default settings, that is $\alpha \log \hat\pi(a_h|s_h)$, and not the token rewards
        themselves: these differ from it by the change of the soft value, which arbitrary constants of the logits move and
        which cancels in the sum.
        """
        if self.aggregate_from(stats) is None:
            return None
        weights = aggregate_weights(len(stats.token_ids), self.aggregate, self.discount)
        if self.token_reward == "bellman":
            keep = self.aggregate == "discounted"
            return bellman_contributions(stats.chosen_logits, self._state_values(stats), weights, self.gamma, keep)
        return Contributions(weights * self._action_rewards(stats).double())

    def _outcome(self, stats: TokenStats, aggregate: Aggregate, corrected: bool = True) -> float | None:
        if len(stats.token_ids) == 0 or (self.truncation == "skip" and not stats.finished):
            return None
        # Only Bellman rewards contain the potential V, of which V(s_1) is a constant of the prompt.
        initial_value = stats.soft_values[0].double() if self.token_reward == "bellman" else 0.0
        rewards = self._action_rewards(stats, corrected)
        return outcome_reward(rewards, initial_value, aggregate, self.discount).item()

    def as_reward_model(self) -> "RewardModelAdapter":
        """
        This reward as the `reward_model` of TRL's own PPO trainer, `trl.experimental.ppo.PPOTrainer` (up to TRL 1.12).

        Returns:
            [`~endotrl.rewards.reward_model_adapter.RewardModelAdapter`], a `torch.nn.Module`.

        Raises:
            `ValueError`: If the reward has a setting that a reward model cannot have (`truncation="skip"`, `criterion`).
            `RuntimeError`: If the reward shares a trainer's weights and is not attached.

        Example:
        ```python
        >>> reward_model = EndogenousReward("quickstart").as_reward_model()
        ```
        """
        from .reward_model_adapter import RewardModelAdapter  # imports `trl.experimental`, which most users do without

        return RewardModelAdapter(self)

    def _rows(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None,
        domain: Sequence[str] | None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        environment: Sequence[str] | None = None,
    ) -> list[Rendered]:
        criteria = criteria_of_rows(self.criterion, domain, len(prompts))
        return self._render(prompts, completions, completion_ids, criteria, log_extra, environment)

    def _action_rewards(self, stats: TokenStats, corrected: bool = True) -> Tensor:
        if self.truncation == "skip" and not stats.finished:
            return torch.full_like(stats.chosen_logits, torch.nan)
        rewards = token_rewards(
            stats.chosen_logits, self._state_values(stats), self.alpha, self.gamma, self.token_reward, stats.entropies
        )
        return correct_tokens(rewards, stats, self.correction if corrected else None)

    def _state_values(self, stats: TokenStats) -> Tensor:
        """Soft values, of shape `(H + 1,)`, in which 0 follows the last token if the completion counts as ended there."""
        if self.truncation == "terminal" and not stats.finished:
            return torch.cat([stats.soft_values[:-1], torch.zeros(1)])
        return stats.soft_values

    def _score_rows(
        self, rows: list[Rendered], entropy: bool, mean_logits: bool = False, progress: bool = False
    ) -> list[TokenStats]:
        if self._scorer is None:
            self._check_generalist()
        stats = super()._score_rows(rows, entropy, mean_logits, progress)
        if self._generalist is None:
            return stats
        others = self._generalist._score_rows(rows, entropy=False, progress=progress)
        return [replace(row, generalist_log_probs=other.log_probs) for row, other in zip(stats, others, strict=True)]

    def _check_generalist(self) -> None:
        """Raises `ValueError` if the generalist of [`InformationGain`] has another tokenizer."""
        if self._generalist is None:
            return
        theirs, ours = self._generalist._tokenizer, self._tokenizer
        if theirs is not ours and theirs.get_vocab() != ours.get_vocab():
            raise ValueError(
                f"The generalist {self._generalist.config._name_or_path!r} has another tokenizer than the frozen model "
                f"{self.config._name_or_path!r}, so that their log-probabilities are of different tokens. Take two models of one "
                "family."
            )


def _is_evaluation(log_metric: Callable[[str, float], None] | None) -> bool:
    """Whether a trainer evaluates: TRL's loggers are methods of the trainer, and nothing else that it passes tells."""
    trainer: Any = log_metric.__self__ if isinstance(log_metric, MethodType) else None
    # Only trainers have reward functions, and importing `Trainer` takes seconds.
    return hasattr(trainer, "reward_funcs") and not trainer.model.training
