# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of many families, ragged rows, and the numbers of a row alone: all logits, one row at a time."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import torch
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from endotrl.frozen.loaded_model import LoadedModel
from endotrl.rendering.renderer import Rendered
from endotrl.scoring import FrozenScorer
from endotrl.scoring.forward_pass import RopeLengths

from ..support.reference import scores_from_logits, state_logits


VOCAB_SIZE, EOS = 97, 1
SHARED = {"vocab_size": VOCAB_SIZE, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
# Most families take these. Weights are larger than usual, so that a random model has opinions.
SIZES = {
    **SHARED,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
ORIGINAL = 12  # length in tokens beyond which frequencies change
SHORT = {**SIZES, "max_position_embeddings": ORIGINAL}
GPT_SIZES = {**SHARED, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
MAMBA_SIZES = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LAYER_TYPES = ["full_attention", "sliding_attention"]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
BY_LAYER = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LLAMA_4_SCALING = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA_4_SCALING |= {"llama_4_scaling_beta": 0.5}

BY_LENGTH: dict[str, Callable[[], PretrainedConfig]] = {
    "llama, dynamic": lambda: LlamaConfig(**SHORT, rope_parameters=DYNAMIC),
    "mistral with a window, dynamic": lambda: hf.MistralConfig(**SHORT, sliding_window=9, rope_parameters=DYNAMIC),
    "gemma3, dynamic in some layers": lambda: hf.Gemma3TextConfig(
        **SHORT, head_dim=8, sliding_window=64, rope_parameters=BY_LAYER, layer_types=LAYER_TYPES
    ),
    "phi3, longrope": lambda: hf.Phi3Config(
        **SIZES, original_max_position_embeddings=ORIGINAL, rope_parameters=LONGROPE
    ),
    "minicpm3, longrope": lambda: hf.MiniCPM3Config(
        **{**SIZES, **LATENT, "num_key_value_heads": 4}, rope_parameters=LONGROPE
    ),
    "phimoe, longrope and scales by length": lambda: hf.PhimoeConfig(
        **SIZES, num_local_experts=4, rope_parameters={**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.5}
    ),
}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama, untied head": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama, tied head": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=8),
    "gemma2, soft cap": lambda: hf.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "gemma3, sliding window": lambda: hf.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4),
    "granite, logit scale": lambda: hf.GraniteConfig(**SIZES, logits_scaling=4.0),
    "cohere, logit scale": lambda: hf.CohereConfig(**SIZES, logit_scale=0.25),
    "cohere2, logit scale": lambda: hf.Cohere2Config(**SIZES, head_dim=8, logit_scale=0.25),
    "phi, head with bias": lambda: hf.PhiConfig(**SIZES),
    "gpt-j, head with bias": lambda: hf.GPTJConfig(**GPT_SIZES, rotary_dim=4),
    "gpt2, learned positions": lambda: hf.GPT2Config(**GPT_SIZES),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**SIZES),
    "opt, projected embeddings": lambda: hf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16, init_std=0.3),
    "bloom, ALiBi": lambda: hf.BloomConfig(**SHARED, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    "falcon": lambda: hf.FalconConfig(**{k: v for k, v in SIZES.items() if k != "intermediate_size"}),
    "mixtral, experts": lambda: hf.MixtralConfig(**SIZES, num_local_experts=4),
    "mamba, recurrent": lambda: hf.MambaConfig(**SHARED, hidden_size=32, num_hidden_layers=2, state_size=4),
    "qwen2, window not used": lambda: hf.Qwen2Config(**SIZES, sliding_window=16, use_sliding_window=False),
    "mistral, window": lambda: hf.MistralConfig(**SIZES, sliding_window=16),
    "lfm2, convolutions": lambda: hf.Lfm2Config(**SIZES, full_attn_idxs=[1]),
    "falcon-h1, attention and state space": lambda: hf.FalconH1Config(**SIZES, **MAMBA_SIZES, lm_head_multiplier=0.5),
    **BY_LENGTH,
    "ministral3, attention scaled by position": lambda: hf.Ministral3Config(**SIZES, rope_parameters=LLAMA_4_SCALING),
    "recurrentgemma, gated recurrence": lambda: hf.RecurrentGemmaConfig(
        **{**SIZES, "num_hidden_layers": 3}, lru_width=32, attention_window_size=16
    ),
    "jamba, state space and experts": lambda: hf.JambaConfig(
        **SIZES, num_experts=4, attn_layer_offset=1, attn_layer_period=2, mamba_d_state=4
    ),
    "qwen3-next, linear attention": lambda: hf.Qwen3NextConfig(
        **SIZES, **LINEAR, **EXPERTS, head_dim=8, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "granite, experts": lambda: hf.GraniteMoeConfig(**SIZES, num_local_experts=4),
}  # fmt: skip


def make_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model


def drawer(seed):
    """Draws random words."""
    generator = torch.Generator().manual_seed(seed)
    return lambda count: torch.randint(2, VOCAB_SIZE, (count,), generator=generator).tolist()


def make_rows():
    """
    Rows of 5 to 40 tokens, many of about `ORIGINAL` and some of equal length, of four prompts: finished and cut off, a
    prompt of one token, completions of one and of none, and one of which a tool has written a part.
    """
    draw = drawer(2)
    prompts = [draw(7), draw(5), draw(3), draw(1)]
    finished = [(0, 4), (0, 5), (1, 7), (0, 6), (1, 8), (0, 6), (2, 20), (2, 1)]
    cut = [(1, 0), (2, 2), (2, 9), (0, 33), (0, 9), (3, 12)]
    rows = [Rendered(prompts[k], [*draw(n - 1), EOS], list(range(n)), True) for k, n in finished]
    rows += [Rendered(prompts[k], draw(n), list(range(n)), False) for k, n in cut]
    return [*rows, replace(rows[-1], action_positions=[0, 1, 6, 7, 8, 9, 10, 11])]


def group_rows():
    """Two prompts in turns, of 7 and 5 tokens, with completions of 3, 4, ..., 8 tokens."""
    draw = drawer(0)
    prompts = [draw(7), draw(5)]
    return [Rendered(prompts[i % 2], [*draw(n - 1), EOS], list(range(n)), True) for i, n in enumerate(range(3, 9))]


def numbers(stats):
    assert stats.entropies is not None
    return stats.chosen_logits, stats.soft_values, stats.entropies


def numbers_alone(model, row, alpha=1.0):
    """Chosen logits, soft values and entropies at the positions that the policy wrote."""
    scores = scores_from_logits(state_logits(model, row.prompt_ids, row.completion_ids), row.completion_ids, alpha)
    last = 0.0 if row.finished else scores.values[-1]
    at = row.action_positions
    return (
        torch.tensor([scores.taken[p] for p in at]),
        torch.tensor([scores.values[p] for p in at] + [last]),
        torch.tensor([scores.entropies[p] for p in at]),
    )


def each_alone(model, rows, alpha=1.0):
    """Every row by itself, by a model that has run nothing else."""
    has_state = bool(RopeLengths.from_config(model.config).limits)
    return [numbers_alone(copy.deepcopy(model) if has_state else model, row, alpha) for row in rows]


def assert_numbers(actual, expected):
    for stats, theirs in zip(actual, expected, strict=True):
        for a, b in zip(numbers(stats), theirs, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@contextmanager
def tokens_run(model):
    """Lists how many tokens each pass embeds."""
    counts: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, args, __: counts.append(args[0].numel()))
    yield counts
    handle.remove()


def score_counted(model, rows, budget=8192):
    """Results of rows, and how many tokens each pass embeds once the scorer has tried the model."""
    scorer = FrozenScorer(LoadedModel(model), budget)
    scorer(rows[:1])
    with tokens_run(model) as counts:
        return scorer(rows), counts


class LengthRope(nn.Module):
    """Frequencies by a rule that no config names."""

    def __init__(self, inner, depends_on):
        super().__init__()
        self.inner, self.depends_on = inner, depends_on

    def forward(self, x, position_ids):
        length = int(position_ids.max()) + 1 if self.depends_on == "positions" else x.shape[1]
        if self.depends_on == "nothing" or length <= 30:
            return self.inner(x, position_ids)
        return self.inner(x, position_ids * 3)


ROPE_INIT_FUNCTIONS["new"] = lambda config, *args, **kwargs: (
    LlamaForCausalLM(LlamaConfig(**SIZES)).model.rotary_emb.inv_freq,
    1.0,
)


def with_rope(rope_type, depends_on):
    """A Llama whose frequencies do as they like, of a `"new"` type or of one that is known."""
    model = make_model(LlamaConfig(**SIZES, rope_parameters={"rope_type": rope_type, "rope_theta": 1e4}))
    model.model.rotary_emb = LengthRope(model.model.rotary_emb, depends_on)
    return model


class OneScale(nn.Linear):
    """Activations of eight bits, with one scale for the whole input."""

    def forward(self, inputs):
        scale = inputs.abs().max().float() / 448
        rounded = (inputs.float() / scale).to(torch.float8_e4m3fn).float() * scale
        return nn.functional.linear(rounded.to(inputs.dtype), self.weight, self.bias)


class Capacity(nn.Linear):
    """Drops what is beyond the capacity of the pass, as experts with a capacity do."""

    def forward(self, inputs):
        flat = inputs.flatten(0, -2)
        rank = (flat[:, 0].argsort(descending=True).argsort() < 0.75 * len(flat)).to(inputs.dtype)
        return super().forward((flat * rank[:, None]).view_as(inputs))


def replace_linear(module, kind):
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = kind
