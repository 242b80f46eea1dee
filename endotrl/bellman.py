# SPDX-License-Identifier: Apache-2.0
"""
The endogenous reward as pure tensor functions: no models, no tokenizers, no TRL.

A response is a trajectory of a token MDP: state `s_h = (prompt, a_1..a_{h-1})`, action `a_h` the next token, horizon
`H`. A language model trained by next-token prediction has logits `f(s, .)` that solve an offline inverse-RL problem
(Prop. 1 of https://huggingface.co/papers/2506.23235), so they can be read as a soft Q-function, and its inverse soft
Bellman operator gives every token a reward.

Notation of tensor shapes: `B` completions, `H` tokens per completion, `V` vocabulary size. All functions compute in
and return float32 whatever the input's dtype, accept any number of leading batch dimensions, and raise `ValueError`
for shapes that do not match and settings that are out of range.
"""

from typing import Literal, NamedTuple, SupportsFloat

import torch
from torch import Tensor


TokenRewardForm = Literal["bellman", "log_prob", "centered"]
Aggregate = Literal["sum", "mean", "discounted"]


def check_alpha(alpha: float) -> None:
    """Raises `ValueError` if `alpha` is not a positive number with which float32 can compute soft values."""
    if not (isinstance(alpha, SupportsFloat) and 1e-30 <= alpha <= 1e30):  # tensors too; YAML reads `1e-1` as text
        raise ValueError(
            f"`alpha` is {alpha!r}, but the temperature of the soft value must be positive and finite in float32: "
            "1e-30 to 1e30."
        )


def check_discount(name: str, value: float) -> None:
    """Raises `ValueError` if the discount `value`, called `name`, is not in `(0, 1]`."""
    if not (isinstance(value, SupportsFloat) and 0.0 < value <= 1.0):
        raise ValueError(f"`{name}` is {value!r}, but a discount must be greater than 0 and at most 1.")


def soft_value(logits: Tensor, alpha: float = 1.0) -> Tensor:
    r"""
    Soft value of a state, $V(s) = \alpha \log \sum_a \exp(f(s, a) / \alpha)$
    (https://huggingface.co/papers/2506.23235, Section 3), of shape `(...)`, from logits $f(s, \cdot)$ of shape `(...,
    V)`; in nats for `alpha=1.0`, the temperature of pretrained and fine-tuned language models.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.bellman import soft_value

    >>> soft_value(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    tensor([0.6931, 1.6931])
    ```
    """
    check_alpha(alpha)
    return alpha * torch.logsumexp(logits.float() / alpha, dim=-1)


def token_rewards(
    chosen_logits: Tensor,
    soft_values: Tensor,
    alpha: float = 1.0,
    gamma: float = 1.0,
    form: TokenRewardForm = "bellman",
    entropies: Tensor | None = None,
) -> Tensor:
    r"""
    Reward of every token of a response.

    - `"bellman"`: $r_h = f(s_h, a_h) - \gamma V(s_{h+1})$, the inverse soft Bellman operator (eq. 11 of
      https://huggingface.co/papers/2506.23235). Equal to $\alpha \log \hat\pi(a_h|s_h) + V(s_h) - \gamma V(s_{h+1})$.
    - `"log_prob"`: $r_h = \alpha \log \hat\pi(a_h|s_h) = f(s_h, a_h) - V(s_h)$, the same without the potential $V$.
    - `"centered"`: $r_h = \alpha (\log \hat\pi(a_h|s_h) + \mathcal{H}(\hat\pi(\cdot|s_h)))$, whose expectation under
      the frozen model is 0 at every length, so that length alone earns nothing.

    `soft_values` decides what follows the last token: $V(s_{H+1}) = 0$ for a response that ended (terminal state), the
    model's own value to bootstrap a response that was cut off.

    Args:
        chosen_logits (`torch.Tensor` of shape `(..., H)`), soft_values (`torch.Tensor` of shape `(..., H + 1)`):
            Logit of the chosen token, $f(s_h, a_h)$, and $V(s_1), \dots, V(s_{H+1})$.
        alpha (`float`, *optional*, defaults to `1.0`), gamma (`float`, *optional*, defaults to `1.0`):
            Temperature that `soft_values` were computed with, and discount of `"bellman"`, in $(0, 1]$.
        form (`str`, *optional*, defaults to `"bellman"`):
            Form of the reward, see above.
        entropies (`torch.Tensor` of shape `(..., H)`, *optional*):
            Entropy of $\hat\pi(\cdot|s_h) = \mathrm{softmax}(f(s_h, \cdot)/\alpha)$ in nats. Needed by `"centered"`.

    Returns:
        `torch.Tensor` of shape `(..., H)`, float32: rewards, in nats for `alpha=1.0`.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.bellman import token_rewards

    >>> token_rewards(torch.tensor([2.0, 3.0]), torch.tensor([2.5, 3.5, 0.0]))
    tensor([-1.5000,  3.0000])
    ```
    """
    check_alpha(alpha)
    check_discount("gamma", gamma)
    if soft_values.ndim == 0 or soft_values.shape != (*chosen_logits.shape[:-1], chosen_logits.shape[-1] + 1):
        raise ValueError(
            f"`chosen_logits` has shape {tuple(chosen_logits.shape)} and `soft_values` {tuple(soft_values.shape)}, "
            "but `soft_values` must have one entry more in its last dimension: the value of the state after the last "
            "token (0 for a response that ended)."
        )
    if form == "centered" and entropies is not None and entropies.shape != chosen_logits.shape:
        raise ValueError(
            f"`entropies` has shape {tuple(entropies.shape)}, but it must have that of `chosen_logits`, "
            f"{tuple(chosen_logits.shape)}: one entry a token."
        )
    chosen_logits, soft_values = chosen_logits.float(), soft_values.float()
    if form == "bellman":
        return chosen_logits - gamma * soft_values[..., 1:]
    log_prob_rewards = chosen_logits - soft_values[..., :-1]  # alpha * log pi
    if form == "log_prob":
        return log_prob_rewards
    if form == "centered":
        if entropies is None:
            raise ValueError('`form="centered"` needs `entropies`: the entropy of the frozen policy at every token.')
        return log_prob_rewards + alpha * entropies.float()
    raise ValueError(f'Unknown token reward {form!r}: it must be "bellman", "log_prob" or "centered".')


def outcome_reward(
    rewards: Tensor,
    initial_value: Tensor | float = 0.0,
    aggregate: Aggregate = "sum",
    discount: float = 0.95,
) -> Tensor:
    r"""
    Outcome of a whole response, one number, from its token rewards.

    - `"sum"`: $\sum_h r_h - V(s_1)$. For a finished response and `"bellman"` rewards with `gamma=1.0` this telescopes
      to $\alpha \log \hat\pi(y|x)$, the outcome reward (eq. 12 of https://huggingface.co/papers/2506.23235) without
      the constant $V(s_1)$ of the prompt.
    - `"mean"`: the same divided by the number of tokens.
    - `"discounted"`: $\sum_h \delta^{h-1} r_h$ with $\delta$ = `discount`, which depends on about the first
      $1/(1-\delta)$ tokens.

    Args:
        rewards (`torch.Tensor` of shape `(..., H)`):
            Token rewards.
        initial_value (`torch.Tensor` of shape `(...)` or `float`, *optional*, defaults to `0.0`):
            $V(s_1)$, which `"sum"` and `"mean"` leave out. Pass it for `"bellman"` rewards; `"log_prob"` and
            `"centered"` rewards do not contain it.
        aggregate (`str`, *optional*, defaults to `"sum"`), discount (`float`, *optional*, defaults to `0.95`):
            Aggregation, see above, and $\delta$ of `"discounted"`, in $(0, 1]$.

    Returns:
        `torch.Tensor` of shape `(...)`, float32.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.bellman import outcome_reward

    >>> outcome_reward(torch.tensor([-1.5, 3.0]), initial_value=2.5)
    tensor(-1.)
    ```
    """
    num_tokens = rewards.shape[-1] if rewards.ndim else 0
    if num_tokens == 0:
        raise ValueError("A response without a token has no reward: `rewards` is empty in its last dimension.")
    # A column of values would silently broadcast to a table of all pairs.
    if isinstance(initial_value, Tensor) and initial_value.ndim and initial_value.shape != rewards.shape[:-1]:
        raise ValueError(
            f"`initial_value` has shape {tuple(initial_value.shape)} and `rewards` {tuple(rewards.shape)}, but there "
            f"must be one value a response: a number, or shape {tuple(rewards.shape[:-1])}."
        )
    # Bellman rewards are differences of soft values, which are large and cancel: summed in float64, thousands of
    # tokens leave no rounding error in the sum.
    if aggregate == "sum":
        return (rewards.double().sum(dim=-1) - initial_value).float()
    if aggregate == "mean":
        return ((rewards.double().sum(dim=-1) - initial_value) / num_tokens).float()
    if aggregate == "discounted":
        check_discount("discount", discount)
        weights = aggregate_weights(num_tokens, aggregate, discount).to(rewards.device)
        return (rewards.double() * weights).sum(dim=-1).float()
    raise ValueError(f'Unknown aggregate {aggregate!r}: it must be "sum", "mean" or "discounted".')


class Contributions(NamedTuple):
    r"""
    Contributions of the tokens of a response to its outcome.

    Attributes:
        tokens (`torch.Tensor` of shape `(H,)`):
            Contributions of the tokens, float64.
        prompt (`float`, *optional*, defaults to `0.0`), cut_off (`float`, *optional*, defaults to `0.0`):
            Contribution of the prompt, $V(s_1)$, which the aggregate `"discounted"` of `"bellman"` rewards keeps; and
            that of the state after the last token, in a response that was cut off.
    """

    tokens: Tensor
    prompt: float = 0.0
    cut_off: float = 0.0

    @property
    def total(self) -> float:
        """The outcome: the sum of all contributions."""
        return self.tokens.sum().item() + self.prompt + self.cut_off


def aggregate_weights(num_tokens: int, aggregate: Aggregate = "sum", discount: float = 0.95) -> Tensor:
    r"""
    Weights of token rewards in [`outcome_reward`], of shape `(H,)`, float64: 1 for `"sum"`, $1/H$ for `"mean"`,
    $\delta^{h-1}$ for `"discounted"`.
    """
    if aggregate == "discounted":
        return discount ** torch.arange(num_tokens, dtype=torch.float64)
    return torch.full((num_tokens,), 1.0 if aggregate == "sum" else 1.0 / max(1, num_tokens), dtype=torch.float64)


def bellman_contributions(
    chosen_logits: Tensor, soft_values: Tensor, weights: Tensor, gamma: float = 1.0, keep_initial_value: bool = False
) -> Contributions:
    r"""
    Contributions of tokens to a weighted sum of `"bellman"` rewards, $\sum_h w_h (f(s_h, a_h) - \gamma V(s_{h+1}))$,
    without the potential that moves credit from each token to the one before it:

    $$
    c_1 = w_1 (f(s_1, a_1) - V(s_1)), \qquad c_h = w_h f(s_h, a_h) - \gamma w_{h-1} V(s_h) \quad (h > 1).
    $$

    With $\gamma = 1$ and equal weights, $c_h = w_h \alpha \log \hat\pi(a_h|s_h)$: no constant that is added to the
    logits of a state changes it, while it moves the Bellman rewards themselves at will.

    `chosen_logits` `(H,)` and `soft_values` `(H + 1,)` are as in [`token_rewards`], `weights` `(H,)` as from
    [`aggregate_weights`]. With `keep_initial_value`, the outcome keeps $V(s_1)$, as that of `"discounted"` does; it is
    then the prompt's contribution. The returned contributions sum to the outcome.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.bellman import bellman_contributions

    >>> bellman_contributions(torch.tensor([2.0, 3.0]), torch.tensor([2.5, 3.5, 0.0]), torch.ones(2)).tokens
    tensor([-0.5000, -0.5000], dtype=torch.float64)
    ```
    """
    logits, values, weights = chosen_logits.double(), soft_values.double(), weights.double()
    before = torch.cat([weights[:1], gamma * weights[:-1]])
    return Contributions(
        weights * logits - before * values[:-1],
        prompt=(weights[0] * values[0]).item() if keep_initial_value else 0.0,
        cut_off=-(gamma * weights[-1] * values[-1]).item() + 0.0,
    )
