# SPDX-License-Identifier: Apache-2.0
"""
Tokens of a TRL trainer's policy: the rendering of its prompts, their token ids, and the ids of its own that end a
completion.
"""

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from threading import get_ident
from types import FrameType
from typing import Any, Concatenate, Generic, NamedTuple, TypeAlias, TypeVar

import trl
from packaging.version import Version
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .messages import (
    TEMPLATE_COLUMNS,
    Completions,
    Prompts,
    TokenIds,
    check_batch,
    check_lengths,
    template_kwargs_of,
    tokenizer_of,
)


R = TypeVar("R")
T = TypeVar("T")
ProcessingClass: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin
MAX_KEPT = 64  # renderers kept for rows with different tools


class PolicyRow(NamedTuple):
    """The policy's prompt and written tokens in one row of a batch."""

    prompt_ids: list[int]  # without padding
    # Per token of the completion, 1 if the policy wrote it, 0 if a tool did; `None` if it wrote all.
    written: list[int] | None = None


@dataclass(frozen=True)
class PolicyTokens:
    """Information on the token ids that a policy generates."""

    processing_class: ProcessingClass
    eos_token_ids: Sequence[int] = ()  # empty if unknown
    padded: bool | None = None  # whether padding follows the end of a completion; `None` if unknown

    @classmethod
    def of(cls, trainer: Any) -> "PolicyTokens":
        """Those of a trainer's policy; `eos_token_ids` are available from TRL's trainers with reward functions."""
        if Version(trl.__version__) < Version("1.14") and hasattr(trainer, "reward_funcs"):
            # Generation stops at the tokenizer's EOS only.
            eos_token_ids: Sequence[int] = [tokenizer_of(trainer.processing_class).eos_token_id]
        else:
            eos_token_ids = getattr(trainer, "eos_token_ids", ())
        return cls(trainer.processing_class, eos_token_ids, padded=is_online_dpo(trainer))


def is_online_dpo(trainer: Any) -> bool:
    """Whether a trainer is an `OnlineDPOTrainer`, which passes completions with their padding."""
    # By name: importing an experimental module prints a warning.
    return any(
        cls.__name__ == "OnlineDPOTrainer" and cls.__module__.startswith("trl.") for cls in type(trainer).__mro__
    )


@lru_cache(maxsize=8)
def foreign_token_ids(tokenizer: ProcessingClass, others: ProcessingClass) -> frozenset[int] | None:
    """
    Token ids of the tokenizer `others` that have another meaning in `tokenizer`, which is to read them: of tokens that
    were added to one vocabulary (a pad token, reasoning tags). `None` if their vocabularies differ.
    """
    ours, theirs = tokenizer_of(tokenizer), tokenizer_of(others)
    if ours is theirs:
        return frozenset()
    differing = dict(theirs.get_vocab().items() - ours.get_vocab().items())
    return frozenset(differing.values()) if differing.keys() <= theirs.added_tokens_encoder.keys() else None


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that decoding can skip. `all_special_ids` has only the named ones, such as EOS."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {token_id for token_id, token in added if token.special}


@dataclass(frozen=True)
class PromptSettings:
    """Prompt rendering of a trainer's policy."""

    tokens: PolicyTokens
    # With its `tools`, and the `chat_template` that TRL substitutes if the policy's own rewrites earlier turns.
    chat_template_kwargs: dict[str, Any]
    # Tools per environment, if rows of a batch select theirs by the column `environment`.
    tools_of: dict[str | None, list[Any]] | None
    # OnlineDPO continues a last message of the assistant, and tokenizes plain text without special tokens.
    continues_turns: bool

    @classmethod
    def of(cls, trainer: Any) -> "PromptSettings":
        """Those of a trainer; `TypeError` if it has no reward functions."""
        # TRL's trainers with reward functions have no common base class.
        if not hasattr(trainer, "reward_funcs"):
            raise TypeError(
                "`trainer` must be the one with this reward in its `reward_funcs` (a `GRPOTrainer`, `RLOOTrainer`, "
                f"`OnlineDPOTrainer`, `DenseGRPOTrainer` or `PPOTrainer`), got {type(trainer).__name__}."
            )
        # OnlineDPO has no `chat_template_kwargs`, and only GRPO has the others.
        kwargs = dict(getattr(trainer.args, "chat_template_kwargs", None) or {})
        for key in ("tools", "chat_template"):
            if getattr(trainer, key, None):
                kwargs[key] = getattr(trainer, key)
        return cls(
            tokens=PolicyTokens.of(trainer),
            chat_template_kwargs=kwargs,
            tools_of=dict(trainer._env_tools) if getattr(trainer, "_multi_environment", False) else None,
            continues_turns=is_online_dpo(trainer),
        )

    def kwargs_of(self, environment: str | None) -> dict[str, Any]:
        if self.tools_of is None or environment not in self.tools_of:
            return self.chat_template_kwargs
        rest = {key: value for key, value in self.chat_template_kwargs.items() if key != "tools"}
        tools = self.tools_of[environment]
        return {**rest, "tools": tools} if tools else rest


class Reading(NamedTuple):
    """Prompt rendering of a reward. The fields are arguments of [`Renderer`]."""

    processing_class: ProcessingClass
    chat_template_kwargs: dict[str, Any]
    policy_tokens: PolicyTokens | None = None
    continues_turns: bool = False
    keeps_prompts: bool = False


class RewardCall(NamedTuple):
    """A trainer's call of a reward function; `rows` are the rows of its policy, if they can be found."""

    trainer: Any
    rows: list[PolicyRow] | None


def find_call(
    prompts: Prompts, completion_ids: TokenIds | None = None, columns: Mapping[str, Any] | None = None
) -> RewardCall | None:
    """
    Finds the trainer that is requesting rewards of `prompts`, if there is one. TRL passes reward functions neither the
    trainer nor the token ids of the prompts, which may be unexpected (template settings, a processor, a
    `rollout_func`). Both are in the frame of the calling method; `tests/test_contract.py` watches their names. From
    another thread, the trainer is identified by its loggers in the `columns`, and found where it waits.
    """
    found = _call_above(sys._getframe(1), prompts, completion_ids)
    loggers = [column for name, column in (columns or {}).items() if name in ("log_extra", "log_metric")]
    trainer = next((logger.__self__ for logger in loggers if inspect.ismethod(logger)), None)
    if found is None and hasattr(trainer, "reward_funcs"):
        # It waits in another thread for an asynchronous reward.
        others = [frame for thread, frame in sys._current_frames().items() if thread != get_ident()]
        calls = [call for frame in others if (call := _call_above(frame, prompts, completion_ids)) is not None]
        found = next((call for call in calls if call.trainer is trainer), RewardCall(trainer, None))
    return found


def _call_above(frame: FrameType, prompts: Prompts, completion_ids: TokenIds | None) -> RewardCall | None:
    """The reward call that a frame belongs to."""
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name not in ("_generate_and_score_completions", "training_step"):
            continue
        names = frame.f_locals
        written = None
        if "prompt_ids_list" in names:  # GRPO and RLOO
            prompt_ids, scored = [list(map(int, ids)) for ids in names["prompt_ids_list"]], names["prompts"]
            # Tools, and the environment of a `rollout_func` (`env_mask`), write into completions.
            written = names.get("tool_mask_list")
        elif "prompt_mask" in names and is_online_dpo(names["self"]):
            rows = zip(names["prompt_ids"], names["prompt_mask"], strict=True)
            prompt_ids, scored = [ids[mask.bool()].tolist() for ids, mask in rows], 2 * names["prompts"]
        else:
            continue
        policy_rows = list(map(PolicyRow, prompt_ids, written or [None] * len(prompt_ids)))
        if list(prompts) != list(scored):
            # A reward function may call another one with some of its rows, or with other prompts.
            batch = list(zip(scored, names.get("completion_ids_list", ()), policy_rows, strict=False))
            asked = zip(prompts, map(list, completion_ids or ()), strict=False)
            found = [next((row for *theirs, row in batch if theirs == [*own]), None) for own in asked]
            policy_rows = [row for row in found if row is not None]
        return RewardCall(names["self"], policy_rows if len(policy_rows) == len(prompts) else None)
    return None


@dataclass(eq=False)
class PolicyBinding(Generic[R]):
    """Objects made by `make` from a [`Reading`], which render prompts like the policy of the calling trainer."""

    given: ProcessingClass | None
    given_kwargs: dict[str, Any] | None
    own: Callable[[], ProcessingClass]
    make: Callable[[Reading], R]
    on_bind: Callable[[Any], None] | None = None
    tokens: PolicyTokens | None = None  # of the policy, for use without a trainer
    policy: PromptSettings | None = field(default=None, init=False)
    _made: dict[str, R] = field(default_factory=dict, init=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "policy": None, "_made": {}}

    def bind(self, trainer: Any) -> None:
        """Renders like the policy of a trainer from now on."""
        policy = PromptSettings.of(trainer)
        if policy != self.policy:
            self.policy = policy
            self.forget()
        if self.on_bind is not None:
            self.on_bind(trainer)

    @property
    def policy_tokens(self) -> PolicyTokens | None:
        return self.tokens if self.policy is None else self.policy.tokens

    def forget(self) -> None:
        """Clears the cache, as the model is another one."""
        self._made = {}

    def reading(self, environment: str | None = None) -> Reading:
        """Rendering of an environment's rows: by the user's arguments, key by key, and otherwise as the policy's."""
        own, given, policy = self.own(), self.given_kwargs or {}, self.policy
        if policy is None:
            return Reading(own, given, self.tokens)
        theirs = policy.tokens.processing_class
        foreign = foreign_token_ids(own, theirs)
        keeps_template = self.given is not None and own.chat_template not in (None, theirs.chat_template)
        taken_over = policy.kwargs_of(environment)
        if keeps_template or foreign is None:
            # A template writes special tokens of its own tokenizer.
            taken_over = {key: value for key, value in taken_over.items() if key != "chat_template"}
        elif foreign:
            taken_over = {"chat_template": theirs.chat_template, **taken_over}
        return Reading(
            processing_class=own if keeps_template or foreign is None or foreign else theirs,
            chat_template_kwargs={**taken_over, **given},
            policy_tokens=policy.tokens,
            continues_turns=policy.continues_turns,
            keeps_prompts=keeps_template or any(taken_over.get(key) != value for key, value in given.items()),
        )

    def of(self, environment: str | None = None, template_kwargs: Mapping[str, Any] | None = None) -> R:
        """Renderer for an environment's rows with their own chat template arguments."""
        key = json.dumps([environment, template_kwargs or {}], default=repr)  # unsorted: templates write keys in order
        made = self._made.get(key)
        if made is None:  # not looked up again: another thread may drop it
            reading = self.reading(environment)
            merged = {**reading.chat_template_kwargs, **(template_kwargs or {})}
            if len(self._made) >= MAX_KEPT:
                self._made.clear()
            self._made[key] = made = self.make(reading._replace(chat_template_kwargs=merged))
        return made

    def render(
        self,
        method: Callable[Concatenate[R, ...], list[T]],
        prompts: Prompts,
        completions: Completions,
        completion_ids: TokenIds | None,
        *columns: Sequence[Any] | None,
        of_dataset: Mapping[str, Any],
    ) -> list[T]:
        """Renders a batch by `method`, like the policy of the calling trainer; `of_dataset` are its columns."""
        call = find_call(prompts, completion_ids, of_dataset)
        if call is not None:
            self.bind(call.trainer)
        given = prompts, completions, completion_ids, *columns, None if call is None else call.rows
        kinds: dict[int, tuple[R, list[int]]] = {}
        for i, settings in enumerate(self._settings_of_rows(prompts, of_dataset, call is not None)):
            renderer = self.of(*settings)
            kinds.setdefault(id(renderer), (renderer, []))[1].append(i)
        check_batch(prompts, completions, completion_ids)  # as a whole, before it is split
        rows: dict[int, T] = {}
        for renderer, chosen in kinds.values():
            theirs = [None if column is None else [column[i] for i in chosen] for column in given]
            rows.update(zip(chosen, method(renderer, *theirs), strict=True))
        return [rows[i] for i in range(len(prompts))]

    def _settings_of_rows(
        self, prompts: Prompts, columns: Mapping[str, Any], in_trainer: bool
    ) -> Iterator[tuple[str | None, dict[str, Any]]]:
        """Environment per row, if environments have different tools, and the row's own chat template arguments."""
        own: dict[str, Sequence[Any]] = {}
        if not in_trainer:  # TRL's trainers with reward functions ignore such columns
            own = {name: columns[name] for name in TEMPLATE_COLUMNS if columns.get(name) is not None}
        environments = None if self.policy is None or self.policy.tools_of is None else columns.get("environment")
        check_lengths(len(prompts), **own)
        for i, prompt in enumerate(prompts):
            row = {} if isinstance(prompt, str) else {name: column[i] for name, column in own.items()}
            yield None if environments is None else environments[i], template_kwargs_of(row)
