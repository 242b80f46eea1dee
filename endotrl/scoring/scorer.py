# SPDX-License-Identifier: Apache-2.0
"""The frozen model's logit and soft value at every token of a completion."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..bellman import check_alpha
from .batching import plan_batches
from .lm_head import LogitTransform, token_statistics
from .placement import Placement
from .rendering import Rendered


@dataclass(frozen=True)
class TokenStats:
    r"""
    What the frozen model says about one completion of `H` scored tokens.

    Attributes:
        token_ids (`torch.Tensor` of shape `(H,)`):
            The scored tokens, EOS included if it was generated.
        positions (`torch.Tensor` of shape `(H,)`):
            Their positions in the completion: `0..H-1`, with gaps where tools wrote.
        chosen_logits (`torch.Tensor` of shape `(H,)`):
            $f(s_h, a_h)$, float32.
        soft_values (`torch.Tensor` of shape `(H + 1,)`):
            $V(s_h)$, float32. The last entry is $V(s_{H+1})$: 0 if the completion is finished (terminal state), else
            the model's value of the state after the last token.
        entropies (`torch.Tensor` of shape `(H,)`, *optional*):
            Entropy of $\hat\pi(\cdot|s_h)$ in nats, float32.
        finished (`bool`):
            `True` if the completion ends with an end-of-sequence token.
        alpha (`float`):
            Temperature of the soft values.
        num_completion_tokens (`int`):
            Length of the completion in tokens, with those that are not scored.
        text (`str`, *optional*):
            The completion, decoded with its special tokens.
        offsets (`list[tuple[int, int]]`, *optional*):
            Span of characters in `text` of every scored token. A token that ends inside a character has an empty span.
    """

    token_ids: Tensor
    positions: Tensor
    chosen_logits: Tensor
    soft_values: Tensor
    entropies: Tensor | None
    finished: bool
    alpha: float
    num_completion_tokens: int
    text: str | None = None
    offsets: list[tuple[int, int]] | None = None

    @property
    def log_probs(self) -> Tensor:
        r"""$\log \hat\pi(a_h|s_h) = (f(s_h, a_h) - V(s_h)) / \alpha$, of shape `(H,)`, in nats."""
        return (self.chosen_logits - self.soft_values[:-1]) / self.alpha


class FrozenScorer:
    """
    Scores rendered completions with a frozen language model: one forward pass over prompt and completion, the LM head
    only at the scored positions and only in blocks, so that no tensor of (tokens, vocabulary) exists.

    Args:
        placement (`Placement`):
            Whose weights to use.
        max_tokens_per_batch (`int`, *optional*, defaults to `8192`):
            Padded tokens of one forward pass. It bounds memory and does not change results.
    """

    def __init__(self, placement: Placement, max_tokens_per_batch: int = 8192) -> None:
        plan_batches([], max_tokens_per_batch)  # raises now if the budget is not a budget
        self.placement = placement
        self.max_tokens_per_batch = max_tokens_per_batch
        self._transform = LogitTransform.from_config(placement.config)
        self._head_checked = False

    def __call__(
        self, rows: Sequence[Rendered], alpha: float = 1.0, entropy: bool = True, progress: bool = False
    ) -> list[TokenStats]:
        """
        Scores completions.

        Args:
            rows (`Sequence[Rendered]`):
                Token ids of prompts and completions.
            alpha (`float`, *optional*, defaults to `1.0`):
                Temperature of the soft value.
            entropy (`bool`, *optional*, defaults to `True`):
                Whether to compute entropies.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            `list[TokenStats]` on the CPU, in the order of `rows`.

        Raises:
            `ValueError`: If a token id is not in the frozen model's vocabulary, or if the model's logits are NaN or
            infinite; the rows are named.
        """
        check_alpha(alpha)
        self._check_ids(rows)
        lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
        results: list[TokenStats | None] = [None] * len(rows)
        with (
            torch.no_grad(),
            self.placement.active() as model,
            tqdm(total=len(rows), desc="Scoring", unit=" completions", disable=not progress) as bar,
        ):
            self._check_head(model)
            for batch in plan_batches(lengths, self.max_tokens_per_batch):
                for index, stats in zip(
                    batch, self._score_batch(model, [rows[i] for i in batch], alpha, entropy), strict=True
                ):
                    results[index] = stats
                bar.update(len(batch))
        scored = [stats for stats in results if stats is not None]
        self._check_finite(scored)
        return scored

    def _score_batch(
        self, model: PreTrainedModel, rows: list[Rendered], alpha: float, entropy: bool
    ) -> list[TokenStats]:
        """One forward pass over right-padded rows. Causal attention never looks right, so no mask is needed."""
        device = model.get_input_embeddings().weight.device
        sequences = [row.prompt_ids + row.completion_ids for row in rows]
        width = max(len(sequence) for sequence in sequences)
        input_ids = torch.zeros(len(rows), width, dtype=torch.long)  # (B, T)
        for i, sequence in enumerate(sequences):
            input_ids[i, : len(sequence)] = torch.tensor(sequence)
        hidden_states = last_hidden_states(model, input_ids.to(device))  # (B, T, D)

        # The state that predicts token j of a completion is the position before it. A completion that was cut off has
        # one state more, the one after its last token; its "token" is a dummy, only its value is used.
        states, tokens, counts = [], [], []
        for i, row in enumerate(rows):
            first = i * width + len(row.prompt_ids) - 1
            row_states = [first + position for position in row.action_positions]
            row_tokens = [row.completion_ids[position] for position in row.action_positions]
            if not row.finished:
                row_states.append(first + len(row.completion_ids))
                row_tokens.append(0)
            states.extend(row_states)
            tokens.extend(row_tokens)
            counts.append(len(row_states))
        token_ids = torch.tensor(tokens, dtype=torch.long)
        selected = hidden_states.flatten(0, 1)[torch.tensor(states, device=hidden_states.device)]  # (N, D)
        head = model.get_output_embeddings()
        # With a model spread over devices, the backbone can end elsewhere than the head is.
        head_device = next(head.parameters()).device
        chosen, values, entropies = token_statistics(
            selected.to(head_device), head, token_ids.to(head_device), alpha, self._transform, entropy
        )
        chosen, values = chosen.cpu(), values.cpu()
        entropies = None if entropies is None else entropies.cpu()

        results, start = [], 0
        for row, count in zip(rows, counts, strict=True):
            num_tokens = len(row.action_positions)
            actions, end = slice(start, start + num_tokens), start + count
            # The terminal state has no value: only so does the sum of rewards telescope to the outcome (eq. 12 of
            # https://huggingface.co/papers/2506.23235).
            row_values = torch.cat([values[start:end], torch.zeros(1)]) if row.finished else values[start:end].clone()
            results.append(
                TokenStats(
                    token_ids=token_ids[actions].clone(),
                    positions=torch.tensor(row.action_positions, dtype=torch.long),
                    chosen_logits=chosen[actions].clone(),
                    soft_values=row_values,
                    entropies=None if entropies is None else entropies[actions].clone(),
                    finished=row.finished,
                    alpha=alpha,
                    num_completion_tokens=len(row.completion_ids),
                )
            )
            start = end
        return results

    def _check_ids(self, rows: Sequence[Rendered]) -> None:
        vocab_size = self.placement.config.get_text_config().vocab_size
        for i, row in enumerate(rows):
            for ids in (row.prompt_ids, row.completion_ids):
                if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
                    raise ValueError(
                        f"Row {i} contains a token id outside the frozen model's vocabulary of {vocab_size} tokens "
                        f"(ids from {min(ids)} to {max(ids)}). Was it encoded with another tokenizer?"
                    )

    def _check_head(self, model: PreTrainedModel) -> None:
        """
        Once, on eight tokens: hidden states and head must reproduce the model's own logits. It catches a model family
        that transforms its logits in a way this engine does not know, before it gives wrong rewards.
        """
        if self._head_checked:
            return
        vocab_size = model.config.get_text_config().vocab_size
        device = model.get_input_embeddings().weight.device
        input_ids = (torch.arange(8, device=device) * 7919 % vocab_size)[None]  # (1, 8)
        mask = torch.ones_like(input_ids)
        expected = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[0].float()  # (8, V)
        hidden_states = last_hidden_states(model, input_ids)[0]
        head = model.get_output_embeddings()
        targets = expected.argmax(dim=-1)
        chosen, values, _ = token_statistics(
            hidden_states.to(expected.device), head, targets, transform=self._transform, entropy=False
        )
        reference = expected.gather(1, targets[:, None]).squeeze(1)
        error = torch.maximum((chosen - reference).abs(), (values - torch.logsumexp(expected, -1)).abs()).max()
        # Half precision keeps 8 (bfloat16) or 11 bits of a logit, and the two passes may round differently.
        exact = hidden_states.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
        tolerance = (1e-4 if exact else 0.02) * max(1.0, reference.abs().max().item())
        if error.isfinite() and error > tolerance:
            raise ValueError(
                f"The logits of {type(model).__name__} are not its hidden states times its LM head: they differ by "
                f"{error:.3g}. This model family transforms its logits in a way that endotrl does not know; its rewards "
                "would be wrong. Please open an issue with the model's name."
            )
        self._head_checked = True

    def _check_finite(self, results: list[TokenStats]) -> None:
        bad = [
            i
            for i, stats in enumerate(results)
            if not (stats.chosen_logits.isfinite().all() and stats.soft_values.isfinite().all())
        ]
        if bad:
            raise ValueError(
                f"The frozen model ({self.placement.description}) gives NaN or infinite logits for rows "
                f"{', '.join(map(str, bad[:10]))}{', ...' if len(bad) > 10 else ''} of {len(results)}. Its weights are "
                'damaged, or its dtype is too narrow: try `dtype="float32"`.'
            )


def last_hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Hidden states of shape `(B, T, D)` that the LM head reads."""
    backbone: nn.Module = model.base_model
    # Padding is on the right and needs no mask, but without one some families (GPT-2) warn of padding.
    return backbone(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).last_hidden_state
