# SPDX-License-Identifier: Apache-2.0
"""Base class of rewards from a frozen language model: weights, tokenizer, and token statistics of rows."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Self, get_args
from weakref import WeakSet

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..checks import check_choice
from ..frozen.loaded_model import LoadedModel
from ..frozen.names import load_processing_class, load_tokenizer, model_renderer
from ..frozen.own_copy import OwnCopy
from ..frozen.placement import make_scorer, place
from ..frozen.served import ServedModel
from ..frozen.sharded_weights import shards_weights
from ..frozen.shared_weights import SharedWeights, share_with
from ..rendering.images import Images
from ..rendering.messages import Completions, Prompts, TokenIds, criteria_of_rows, images_of_rows
from ..rendering.policy import PolicyBinding, Reading, tokenizer_of
from ..rendering.renderer import OverlongPrompt, Rendered, Renderer
from ..scoring.batching import plan_batches
from ..scoring.scorer import Placement
from ..scoring.token_stats import TokenStats
from .rule import RewardRule


logger = logging.getLogger(__name__)
_warned: WeakSet[Any] = WeakSet()  # trainers


class FrozenModelReward:
    """
    Base class of rewards computed from a frozen language model: its weights and tokenizer, which may be a trainer's,
    and token statistics of completions, from which subclasses compute rewards.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            As in [`EndogenousReward`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of `model`, or a processor that contains it. Loaded with the model if not given. In a trainer
            whose policy has the same tokenizer, its chat template takes precedence over the policy's, with a warning.
        name, max_tokens_per_batch, dtype, device, trust_remote_code, overlong_prompt, chat_template_kwargs, offload,
        model_init_kwargs, adapter_name, images:
            See [`~endotrl.rewards.settings.Settings`].
    """

    rule = RewardRule("log_prob")  # from token statistics to rewards
    criterion: str | Mapping[str, str] | None = None  # system message under which the model judges

    def __init__(
        self,
        model: str | PreTrainedModel | ServedModel | None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
        name: str,
        max_tokens_per_batch: int = 8192,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        overlong_prompt: OverlongPrompt = "error",
        chat_template_kwargs: dict[str, Any] | None = None,
        offload: bool = False,
        model_init_kwargs: dict[str, Any] | None = None,
        adapter_name: str | None = None,
        images: Images = "read",
    ) -> None:
        check_choice("images", images, get_args(Images))
        check_choice("overlong_prompt", overlong_prompt, get_args(OverlongPrompt))
        plan_batches([], max_tokens_per_batch)  # raises now for an invalid budget
        if not isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin | None):
            raise TypeError(
                f"`processing_class` is a {type(processing_class).__name__}, but it must be a tokenizer such as "
                "`AutoTokenizer.from_pretrained` returns, a processor, or `None` to load the model's own."
            )
        self.max_tokens_per_batch = max_tokens_per_batch
        self.trust_remote_code = trust_remote_code
        self.overlong_prompt = overlong_prompt
        self.images = images
        self.__name__ = name  # TRL's name for a callable in logs
        self._loaded: PreTrainedTokenizerBase | ProcessorMixin | None = None
        self._placement = place(model, dtype, device, trust_remote_code, offload, model_init_kwargs, adapter_name)
        if isinstance(self._placement, ServedModel) and self.rule.needs_logits is not None:
            raise ValueError(
                f"The frozen model is on a server, which only returns log-probabilities: {self.rule.needs_logits}. "
                'Use `token_reward="log_prob"` with `alpha=1.0`, the default settings, or a locally loaded model.'
            )
        self._made_for: tuple[str, str] | None = None  # name and digest of the given model, replaced by a trainer's
        makers = self._get_processing_class, self._make_renderer, warn_without_kl_penalty
        self._prompts = PolicyBinding(processing_class, chat_template_kwargs, *makers)
        self._scorer: Callable[..., list[TokenStats]] | None = None  # made on first use; not pickled

    def __getstate__(self) -> dict[str, Any]:
        """Weights are not pickled: an own copy is loaded again on first use, shared weights are attached again."""
        placement = None if self.is_shared else self._placement
        return {**self.__dict__, "_placement": placement, "_scorer": None}

    @property
    def is_shared(self) -> bool:
        """`True` if this reward has no weights of its own: made with `model=None`, or attached to a trainer."""
        return self._placement is None or isinstance(self._placement, SharedWeights)

    @property
    def is_served(self) -> bool:
        """`True` if the frozen model is on a server."""
        return isinstance(self._placement, ServedModel)

    def bind(self, trainer: Any) -> Self:
        """
        Renders prompts like the policy of a trainer: with its processor, chat template, `chat_template_kwargs` and
        `tools`, except where this reward has arguments of its own. It keeps its weights. Only needed by rewards that
        are called from another thread or before training: otherwise a reward finds the trainer that calls it, and the
        token ids of the policy's prompts. Raises `TypeError` for a trainer without `reward_funcs`.
        """
        self._prompts.bind(trainer)
        return self

    def attach(self, trainer: Any) -> Self:
        """
        Shares the frozen weights of a trainer, so that the reward adds no second model to memory: with LoRA, the
        policy with its adapter disabled; with `beta` > 0, the trainer's reference model, whose forward pass over the
        completions the reward then reuses instead of running its own. It renders prompts as with [`bind`].

        Raises:
            `ValueError`: If the trainer has no frozen weights, updates them (`sync_ref_model=True`, LoRA biases) or
            shards them with FSDP1, if its adapter was trained before, or if this reward was given another model.

        Example:
        ```python
        >>> reward = EndogenousReward(model=None)
        >>> trainer = GRPOTrainer(model, reward_funcs=reward, args=GRPOConfig(beta=0.1), train_dataset=dataset)
        >>> reward.attach(trainer)
        >>> trainer.train()
        ```
        """
        if isinstance(self._placement, ServedModel):
            raise ValueError(
                f"The reward scores with {self._placement.description}, so it does not need the trainer's weights. "
                "Don't attach it, or create it with `model=None` to share them."
            )
        self.bind(trainer)
        placement = share_with(trainer)
        if isinstance(self._placement, OwnCopy | LoadedModel):
            self._made_for = self._placement.config._name_or_path, self._placement.digest(placement.dtype)
        if self._made_for is not None and self._made_for[1] != placement.digest():
            if placement.recorder is not None:
                placement.recorder.close()
            raise ValueError(
                f"The reward was made for the model {self._made_for[0]!r}, but the trainer's frozen weights "
                f"({placement.config._name_or_path!r}) have different values. Create it with `model=None` to share "
                "the trainer's weights, or don't attach it to keep its own."
            )
        if isinstance(self._placement, SharedWeights) and self._placement.recorder is not None:
            self._placement.recorder.close()
        self._placement = placement
        self._prompts.forget()
        self._scorer = None
        return self

    def shard(self, trainer: Any) -> Self:
        """
        Shards the reward's own copy over the processes, like the trainer's policy (DeepSpeed ZeRO-3, FSDP2), and
        gathers it for each call. With other engines it stays whole. Raises `ValueError` if the reward has no copy of
        its own, has loaded it already, or was given a `device` or `offload=True`.
        """
        if not isinstance(self._placement, OwnCopy):
            raise ValueError(
                "Only a reward with its own copy of the weights can be sharded, but this one shares a trainer's "
                "weights, or was given a loaded model or a server. Create it with a path: "
                "`EndogenousReward(model=<path>)`."
            )
        if shards_weights(trainer.accelerator):
            self._placement.shard(trainer.accelerator)
        return self

    def load(self) -> Self:
        """Loads tokenizer and weights now, and scores one token, so that problems show before there is data."""
        self._prompts.of()
        probe = Rendered(prompt_ids=[0], completion_ids=[0], action_positions=[0], finished=True)
        self._score_rows([probe], entropy=False)
        return self

    @property
    def model(self) -> PreTrainedModel | ServedModel:
        """The frozen model, for inspection: loaded if necessary, the trainer's if it is shared, or the servers."""
        placement = self._require_placement()
        if isinstance(placement, ServedModel):
            return placement
        with placement.active() as model:
            return model

    @property
    def config(self) -> PretrainedConfig:
        """Configuration of the frozen model; available before the weights are loaded."""
        return self._require_placement().config

    @property
    def processing_class(self) -> PreTrainedTokenizerBase | ProcessorMixin:
        """Tokenizer or processor for prompts: the policy's, if the tokens are the same."""
        return self._prompts.reading().processing_class

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """Chat template arguments: those given, and those of the trainer that the reward is bound to."""
        return self._prompts.reading().chat_template_kwargs

    def _render(
        self, prompts: Prompts, completions: Completions, completion_ids: TokenIds | None, columns: Mapping[str, Any]
    ) -> list[Rendered]:
        """Renders the rows of a batch. `columns` has the other columns and the loggers that a trainer passes."""
        criteria = criteria_of_rows(self.criterion, columns.get("domain"), len(prompts))
        images = images_of_rows(columns.get("image"), columns.get("images"), len(prompts))
        given = prompts, completions, completion_ids, criteria, images
        return self._prompts.render(Renderer.render, *given, of_dataset=columns)

    def _score_rows(self, rows: list[Rendered], entropy: bool, progress: bool = False) -> list[TokenStats]:
        if self._scorer is None:
            self._scorer = make_scorer(self._require_placement(), self.max_tokens_per_batch)
        rule = self.rule
        return self._scorer(rows, rule.alpha, entropy or rule.needs_entropy, rule.needs_mean_logits, progress)

    def _make_renderer(self, reading: Reading) -> Renderer:
        placement = self._require_placement()
        eos_token_ids = [*placement.eos_token_ids, self._tokenizer.eos_token_id]
        return model_renderer(placement.config, eos_token_ids, reading, self.overlong_prompt, self.images)

    def _require_placement(self) -> Placement | ServedModel:
        if self._placement is None:
            raise RuntimeError(
                "This reward was created with `model=None` to share the frozen weights of a trainer, but it is not "
                "attached to one. Call `reward.attach(trainer)` before `trainer.train()`, or pass a model."
            )
        if isinstance(self._placement, ServedModel):
            self._placement.connect(self._tokenizer)
        return self._placement

    def _get_processing_class(self) -> PreTrainedTokenizerBase | ProcessorMixin:
        """The frozen model's tokenizer or processor: given, of the trainer whose weights are shared, or loaded."""
        if self._prompts.given is not None:
            return self._prompts.given
        placement = self._placement if isinstance(self._placement, ServedModel) else self._require_placement()
        if self.is_shared and self._prompts.policy is not None:
            return self._prompts.policy.tokens.processing_class
        if self._loaded is None:
            if isinstance(placement, ServedModel):
                self._loaded = load_tokenizer(placement.tokenizer_name, self.trust_remote_code)
            else:
                self._loaded = load_processing_class(placement.config, self.trust_remote_code)
        return self._loaded

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self._get_processing_class())


def warn_without_kl_penalty(trainer: Any) -> None:
    """Warns once per trainer about training without a KL penalty, TRL's default."""
    from trl import GRPOTrainer, RLOOTrainer  # takes seconds, not needed to score a file

    if not isinstance(trainer, GRPOTrainer | RLOOTrainer) or trainer.beta != 0.0 or trainer in _warned:
        return
    rewards = zip(trainer.reward_funcs, trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True)
    trained = [name for reward, name, weight in rewards if isinstance(reward, FrozenModelReward) and weight != 0.0]
    if trained and trainer.accelerator.is_main_process:
        _warned.add(trainer)
        logger.warning(
            "Training on %s, the reward of a frozen model, with `beta=0` has no KL penalty: the policy collapses onto "
            "the most probable response while the reward keeps rising. Set `beta` > 0, for example "
            "`%s(beta=0.05, ...)`. The optimum is then the frozen model to the power 1 + alpha / beta.",
            ", ".join(trained),
            type(trainer.args).__name__,
        )
