# SPDX-License-Identifier: Apache-2.0
"""Adapter from the endogenous reward to a reward model, for `trl.experimental.ppo.PPOTrainer`, up to TRL 1.12."""

import logging
import sys
from itertools import dropwhile, filterfalse
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from trl.experimental.utils import get_reward

from .corrections import InformationGain, LengthControl


if TYPE_CHECKING:
    from .endogenous import EndogenousReward


logger = logging.getLogger(__name__)


class RewardModelAdapter(nn.Module):
    r"""
    An [`EndogenousReward`] with the interface of the reward model in TRL's PPO trainer. The trainer's
    `get_reward(model, query_responses, pad_token_id, context_length)` returns the reward of each response, equal to
    that of the reward function for the same tokens.

    The frozen model stays with the reward and is not part of the module, so that the trainer does not move, cast,
    shard, save or train it. The module's only parameter is a placeholder.

    A response ends before its first pad token. If the tokenizer pads with an end-of-sequence token, the response ends
    with the first such token, which is scored: TRL's trainer only pads finished responses, unless `stop_token_id` is
    another token. A response without tokens gets 0, the log-probability of an empty text; TRL masks its tokens.

    The frozen model must have the policy's tokenizer: token ids are scored unchanged. `ValueError` for a reward with
    `truncation="skip"`, a `criterion` or a correction other than [`ClipTokens`].
    """

    # TRL calls the attribute of this name as the backbone of a reward model.
    base_model_prefix = "endogenous_backbone"

    def __init__(self, reward: "EndogenousReward") -> None:
        super().__init__()
        if reward.truncation == "skip":
            raise ValueError(
                "`truncation='skip'` gives no reward to responses without EOS, but a reward model must score every "
                "response. Use 'terminal' or 'bootstrap', and `missing_eos_penalty` of the trainer's config."
            )
        if isinstance(reward.correction, LengthControl | InformationGain):
            raise ValueError(
                f"`correction` is {reward.correction!r}, but a reward model only sees single responses under one "
                "model. Use `ClipTokens`, or no correction."
            )
        if reward.criterion is not None:
            raise ValueError(
                "`criterion` cannot be added to the trainer's queries, because they are already tokenized. Remove it, "
                "or tokenize the queries with it."
            )
        self.reward = reward
        self.config = reward.config  # read by `trl.models.utils.prepare_deepspeed`
        self.score = nn.Identity()  # TRL's head from hidden states to rewards
        # DeepSpeed's ZeRO-3 engine takes its dtype from the first parameter, and fails without one.
        self.placeholder = nn.Parameter(torch.zeros(1), requires_grad=False)
        self._warned = False

    def forward(self, query_responses: Tensor, pad_token_id: int, context_length: int) -> Tensor:
        """
        Rewards of responses, of shape `(B,)`, float32, without gradient, from the token ids of queries, padded to
        `context_length`, and responses, padded on the right. Raises `ValueError` for what cannot be scored.
        """
        renderer = self.reward._prompts.of()
        pad_ends = pad_token_id in renderer.ends.stops
        if pad_ends and not self._warned:
            self._warned = True
            logger.warning(
                "The pad token (%d) also ends responses. TRL's PPO hides pad tokens from the policy in the queries, "
                "and does not train it to end its responses. Set another `tokenizer.pad_token`.",
                pad_token_id,
            )
        if pad_token_id in renderer.tokenizer("a")["input_ids"][:1]:
            raise ValueError(
                f"The tokenizer starts every text with its pad token ({pad_token_id}), so the start of a query cannot "
                "be distinguished from padding. Set another `tokenizer.pad_token`."
            )
        queries, responses = [], []
        for row, ids in enumerate(query_responses.tolist()):
            query, response = ids[:context_length], ids[context_length:]
            if pad_ends and query[-1:] == [pad_token_id]:
                raise ValueError(
                    f"The query of row {row} ends with the pad token ({pad_token_id}), which also ends responses, so "
                    "the end of the query is unknown. Pad queries on the left (`padding_side='left'`), and set "
                    "another `tokenizer.pad_token`."
                )
            # A token that both pads and ends also occurs in queries, after their padding.
            written = dropwhile if pad_ends else filterfalse
            queries.append(list(written(pad_token_id.__eq__, query)))
            responses.append(renderer.ends.before_padding(response, pad_token_id))
        rows = self.reward._score_rows(renderer.render_ids(queries, responses), entropy=False)
        rewards = [self.reward.aggregate_from(row) for row in rows]
        return torch.tensor([0.0 if r is None else r for r in rewards], device=query_responses.device)

    def endogenous_backbone(self, **kwargs: Any) -> BaseModelOutput:
        """
        Backbone that TRL's `get_reward` calls for hidden states: the reward of each row, of shape `(B, L, 1)`,
        repeated at every position, so that `get_reward` finds it wherever it takes the response to end.
        """
        # The model gets tokens without padding, and not the start of the response. Both are arguments of `get_reward`,
        # which passes them on in no other way, so they are read from its frame.
        frame = sys._getframe(1)
        if frame.f_code is not get_reward.__code__:
            raise RuntimeError(
                "The backbone of the endogenous reward model was not called by TRL's `get_reward`, so it does not "
                "know where responses start. Call `reward_model(query_responses, pad_token_id, context_length)`."
            )
        given = frame.f_locals
        query_responses: Tensor = given["query_responses"]
        rewards = self(query_responses, given["pad_token_id"], given["context_length"])
        hidden_states = rewards[:, None, None].expand(*query_responses.shape, 1)  # (B, L, 1)
        # TRL 1.12 reads `hidden_states[-1]`, later ones `last_hidden_state`.
        return BaseModelOutput(last_hidden_state=hidden_states, hidden_states=(hidden_states,))
