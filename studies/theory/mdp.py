# SPDX-License-Identifier: Apache-2.0
r"""
Exact tabular token MDPs: everything that the papers prove about token MDPs, small enough to be computed without
sampling.

A token MDP is deterministic: state and token give the next state. States are Markov states, which for a
[`prefix_tree`] are all prefixes. A response has `horizon` tokens, or fewer if a token leads to the terminal state
(EOS). What follows the last token has value 0.

Notation of tensor shapes: `H` horizon, `S` states, `A` tokens of the vocabulary. Rewards, Q-functions and policies
have shape `(H, S, A)`, or any shape that broadcasts to it; values have shape `(H + 1, S)`. Step `h` is counted from 0.
All is float64. A policy is given by its log-probabilities, `-inf` for tokens that it never takes.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from endotrl.bellman import check_alpha


TERMINAL = -1


@dataclass(frozen=True)
class TokenMDP:
    """
    States and what tokens do to them.

    Attributes:
        transitions (`torch.Tensor` of shape `(S, A)`, int64):
            Next state, or `TERMINAL` (-1) where the token ends the response.
        horizon (`int`):
            Largest number of tokens of a response.
        initial (`int`):
            State of the prompt.
    """

    transitions: Tensor
    horizon: int
    initial: int = 0

    def __post_init__(self) -> None:
        states = len(self.transitions) if self.transitions.dim() else 0
        if self.transitions.dim() != 2 or self.transitions.dtype != torch.int64:
            raise ValueError(
                f"`transitions` has shape {tuple(self.transitions.shape)} and dtype {self.transitions.dtype}, but it "
                "must be an int64 tensor of shape (states, tokens)."
            )
        if self.transitions.numel() == 0:
            raise ValueError("`transitions` is empty, but there must be at least one state and one token.")
        if self.transitions.min() < TERMINAL or self.transitions.max() >= states:
            raise ValueError(f"`transitions` leads out of the {states} states: use -1 for the end of a response.")
        if self.horizon < 1:
            raise ValueError(f"`horizon` is {self.horizon}, but a response has at least one token.")
        if not 0 <= self.initial < states:
            raise ValueError(f"`initial` is {self.initial}, but the states are 0 to {states - 1}.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(H, S, A)`."""
        states, tokens = self.transitions.shape
        return self.horizon, states, tokens

    def follow(self, values: Tensor) -> Tensor:
        """
        Value of the next state for every state and token: shape `(S)` to `(S, A)`, 0 where the response ends.
        """
        # TERMINAL is -1, which indexes the 0 that is appended.
        return torch.cat([values, values.new_zeros(1)])[self.transitions]

    def expand(self, table: Tensor) -> Tensor:
        """A table of rewards, Q or log-probabilities as float64 of shape `(H, S, A)`."""
        return table.double().expand(self.shape)


def prefix_tree(num_tokens: int, horizon: int, eos: int | None = None) -> TokenMDP:
    """
    The token MDP of a language model: a state is a prefix. `eos` is the token that ends a response; without one, all
    responses have `horizon` tokens.

    Example:
    ```python
    >>> from studies.theory import prefix_tree

    >>> prefix_tree(num_tokens=3, horizon=2, eos=0).transitions
    tensor([[-1,  1,  2],
            [-1, -1, -1],
            [-1, -1, -1]])
    ```
    """
    if num_tokens < 1 or horizon < 1 or eos not in (None, *range(num_tokens)):
        raise ValueError(
            f"`num_tokens` is {num_tokens}, `horizon` {horizon} and `eos` {eos}, but there must be at least one token "
            "and one step, "
            "and `eos` must be one of the tokens, or `None`."
        )
    words = [token for token in range(num_tokens) if token != eos]
    prefixes = [prefix for length in range(horizon) for prefix in itertools.product(words, repeat=length)]
    index = {prefix: state for state, prefix in enumerate(prefixes)}
    rows = [[index.get((*prefix, token), TERMINAL) for token in range(num_tokens)] for prefix in prefixes]
    return TokenMDP(torch.tensor(rows), horizon)


def soft_values(mdp: TokenMDP, q: Tensor, alpha: float) -> Tensor:
    r"""
    Soft values $V_h(s) = \alpha \log \sum_a e^{Q_h(s, a)/\alpha}$, and 0 after the last step. Returns shape
    `(H + 1, S)`.
    """
    check_alpha(alpha)
    values = alpha * torch.logsumexp(mdp.expand(q) / alpha, dim=-1)
    return torch.cat([values, values.new_zeros(1, values.shape[1])])


def soft_optimal_q(mdp: TokenMDP, rewards: Tensor, alpha: float, reference: Tensor | None = None) -> Tensor:
    r"""
    Soft Bellman optimality by backward induction: $Q_h(s, a) = r_h(s, a) + V_{h+1}(s')$ with
    $V_h(s) = \alpha \log \sum_a \rho_h(a|s) e^{Q_h(s, a)/\alpha}$.

    Without `reference`, $\rho = 1$ and the optimum is that of reward plus $\alpha$ times entropy. With the
    log-probabilities of a `reference` policy it is that of reward minus $\alpha$ times the KL to it. The optimal
    policy is
    [`soft_policy`] of the result, with the same `reference`.

    Returns:
        `torch.Tensor` of shape `(H, S, A)`: differentiable with respect to `rewards`.
    """
    check_alpha(alpha)
    rewards = mdp.expand(rewards)
    offsets = torch.zeros_like(rewards) if reference is None else alpha * mdp.expand(reference)
    value = rewards.new_zeros(rewards.shape[1])
    backward = []
    for h in reversed(range(mdp.horizon)):
        q = rewards[h] + mdp.follow(value)
        value = alpha * torch.logsumexp((q + offsets[h]) / alpha, dim=-1)
        backward.append(q)
    return torch.stack(backward[::-1])


def soft_policy(q: Tensor, alpha: float, reference: Tensor | None = None) -> Tensor:
    r"""Log-probabilities of $\pi(a|s) \propto \rho(a|s) e^{Q(s, a)/\alpha}$, with $\rho = 1$ without `reference`."""
    return (q / alpha + (0.0 if reference is None else reference)).log_softmax(-1)


def optimal_q(mdp: TokenMDP, rewards: Tensor) -> Tensor:
    r"""Bellman optimality, $Q_h(s, a) = r_h(s, a) + \max_{a'} Q_{h+1}(s', a')$. Returns shape `(H, S, A)`."""
    rewards = mdp.expand(rewards)
    value = rewards.new_zeros(rewards.shape[1])
    backward = []
    for h in reversed(range(mdp.horizon)):
        q = rewards[h] + mdp.follow(value)
        value = q.max(dim=-1).values
        backward.append(q)
    return torch.stack(backward[::-1])


def greedy_policy(q: Tensor) -> Tensor:
    """Log-probabilities (0 and `-inf`) of the policy that takes the best token, the first one among equals."""
    best = torch.nn.functional.one_hot(q.argmax(-1), q.shape[-1])
    return best.double().log()


def inverse_soft_bellman(mdp: TokenMDP, q: Tensor, alpha: float) -> Tensor:
    r"""
    The endogenous reward, $r_h(s, a) = Q_h(s, a) - V_{h+1}(s')$ (eq. 11 of https://huggingface.co/papers/2506.23235):
    the rewards of which `q` is the soft-optimal Q-function. Returns shape `(H, S, A)`.
    """
    q = mdp.expand(q)
    values = soft_values(mdp, q, alpha)
    return torch.stack([q[h] - mdp.follow(values[h + 1]) for h in range(mdp.horizon)])


def policy_values(mdp: TokenMDP, rewards: Tensor, policy: Tensor) -> Tensor:
    """Expected sum of rewards from every state and step on under a policy (log-probabilities). Shape `(H + 1, S)`."""
    rewards, probabilities = mdp.expand(rewards), mdp.expand(policy).exp()
    values = [rewards.new_zeros(rewards.shape[1])]
    for h in reversed(range(mdp.horizon)):
        q = rewards[h] + mdp.follow(values[-1])
        # A token that is never taken costs nothing, even one with an infinite reward.
        values.append(torch.where(probabilities[h] > 0, probabilities[h] * q, 0.0).sum(-1))
    return torch.stack(values[::-1])


def policy_q(mdp: TokenMDP, rewards: Tensor, policy: Tensor) -> Tensor:
    """Expected sum of rewards of each token and of what follows it under a policy. Shape `(H, S, A)`."""
    rewards, values = mdp.expand(rewards), policy_values(mdp, rewards, policy)
    return torch.stack([rewards[h] + mdp.follow(values[h + 1]) for h in range(mdp.horizon)])


def expected_return(mdp: TokenMDP, rewards: Tensor, policy: Tensor) -> float:
    """Expected sum of rewards of a response to the prompt."""
    return policy_values(mdp, rewards, policy)[0, mdp.initial].item()


def suboptimality(mdp: TokenMDP, rewards: Tensor, policy: Tensor, against: Tensor | None = None) -> float:
    """
    What a policy loses in expected return: to the policy `against`, or to the best policy there is.
    """
    if against is None:
        against = greedy_policy(optimal_q(mdp, rewards))
    return expected_return(mdp, rewards, against) - expected_return(mdp, rewards, policy)


def occupancy(mdp: TokenMDP, policy: Tensor) -> Tensor:
    """Probability that step `h` is in state `s` and takes token `a`. Shape `(H, S, A)`."""
    probabilities = mdp.expand(policy).exp()
    _, states, _ = mdp.shape
    here = torch.zeros(states, dtype=torch.float64)
    here[mdp.initial] = 1.0
    goes_on = mdp.transitions != TERMINAL
    steps = []
    for h in range(mdp.horizon):
        taken = here[:, None] * probabilities[h]
        steps.append(taken)
        here = torch.zeros_like(here).index_add(0, mdp.transitions[goes_on], taken[goes_on])
    return torch.stack(steps)


def kl_divergence(mdp: TokenMDP, policy: Tensor, reference: Tensor) -> float:
    r"""$KL(\pi(y) \| \rho(y))$ of the responses of two policies, in nats: the sum of the tokens' KLs under $\pi$."""
    policy, reference = mdp.expand(policy), mdp.expand(reference)
    weights = occupancy(mdp, policy)
    return torch.where(weights > 0, weights * (policy - reference), 0.0).sum().item()


def log_error(policy: Tensor, reference: Tensor) -> float:
    r"""$\max_{h, s, a} |\log \pi - \log \rho|$, in nats: the error of the next token in the worst case."""
    return (policy - reference).abs().max().item()


def total_variation(policy: Tensor, reference: Tensor) -> float:
    r"""$\max_{h, s} TV(\pi(\cdot|s), \rho(\cdot|s))$, between 0 and 1."""
    return 0.5 * (policy.exp() - reference.exp()).abs().sum(-1).max().item()


def responses(mdp: TokenMDP) -> Tensor:
    """
    Every response, shape `(N, H)`, int64; after the end of a response comes -1. There are up to `A ** H` of them, so
    this is for small ones.
    """
    rows: list[list[int]] = []
    stack: list[tuple[int, list[int]]] = [(mdp.initial, [])]
    following = mdp.transitions.tolist()
    while stack:
        state, tokens = stack.pop()
        if state == TERMINAL or len(tokens) == mdp.horizon:
            rows.append(tokens + [-1] * (mdp.horizon - len(tokens)))
        else:
            stack += [(after, [*tokens, token]) for token, after in enumerate(following[state])]
    return torch.tensor(sorted(rows))


def response_sums(mdp: TokenMDP, table: Tensor, tokens: Tensor) -> Tensor:
    """
    Sum of a table along each response: its return for rewards, its log-probability for a policy.

    Args:
        mdp ([`TokenMDP`]):
            The token MDP.
        table (`torch.Tensor` of shape `(H, S, A)`):
            What to sum.
        tokens (`torch.Tensor` of shape `(N, H)`):
            Responses as [`responses`] gives them.

    Returns:
        `torch.Tensor` of shape `(N)`: differentiable with respect to `table`.
    """
    table = mdp.expand(table)
    state = torch.full((len(tokens),), mdp.initial)
    total = table.new_zeros(len(tokens))
    for h in range(mdp.horizon):
        taken = tokens[:, h]
        alive = taken >= 0
        total = total + torch.where(alive, table[h, state, taken], 0.0)
        state = torch.where(alive, mdp.transitions[state, taken], state).clamp(min=0)
    return total


def sample_responses(mdp: TokenMDP, policy: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Samples of a policy, shape `(number, H)`, as [`responses`] gives them."""
    probabilities = mdp.expand(policy).exp()
    state = torch.full((number,), mdp.initial)
    alive = torch.ones(number, dtype=torch.bool)
    columns = []
    for h in range(mdp.horizon):
        token = torch.multinomial(probabilities[h, state], 1, generator=generator).squeeze(1)
        columns.append(torch.where(alive, token, -1))
        after = mdp.transitions[state, token]
        alive = alive & (after != TERMINAL)
        state = torch.where(alive, after, 0)
    return torch.stack(columns, dim=1)
