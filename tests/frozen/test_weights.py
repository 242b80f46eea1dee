# SPDX-License-Identifier: Apache-2.0
"""
Models by their weights, and models whose weights are not plain tensors of their modules: offloaded, quantised,
parametrised. The naive values are those of full logits, one sequence at a time, of the model as it is given.
"""

import math
from functools import partial

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

from endotrl.frozen.loaded_model import (
    LoadedModel,
    backbone,
    have_moved,
    named_weights,
    sample_weights,
    weights_digest,
)
from endotrl.rendering.renderer import Rendered
from endotrl.scoring.scorer import FrozenScorer

from ..scoring.families import assert_numbers, numbers_alone
from ..support.reference import scores_from_logits, state_logits


CPU = torch.device("cpu")
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2}
ROWS = [([5, 6, 7], [8, 9, 1]), ([5, 6, 7], [30, 31]), ([11, 12], [13, 14, 15, 16, 17, 18, 19, 1])]


def make_model(**config):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **config}, initializer_range=0.3)).eval()


def assert_scored(model):
    """Twice: what the first call changed in the model must not matter, nor be taken for training."""
    rows = [Rendered(prompt, ids, list(range(len(ids))), finished=False) for prompt, ids in ROWS]
    expected, scorer = [numbers_alone(model, row) for row in rows], FrozenScorer(LoadedModel(model))
    for _ in range(2):
        assert_numbers(scorer(rows), expected)


def scaled(row):
    model = make_model()
    model.lm_head.weight.data[row, 3] *= 1.01
    return model


def swapped(row):
    model = make_model()
    model.lm_head.weight.data[[0, row]] = model.lm_head.weight.data[[row, 0]]
    return model


def configured(**settings):
    """As trainers set it."""
    model = make_model()
    vars(model.config).update(settings)
    return model


class TestDigest:
    @pytest.mark.parametrize(
        ("make", "is_same"),
        [
            (lambda: make_model().bfloat16(), True),
            (lambda: make_model().double(), True),
            (lambda: configured(use_cache=False, pad_token_id=3), True),
            (lambda: configured(attention_dropout=0.1, output_attentions=False), True),
            *((partial(scaled, row), False) for row in (0, 17, 39)),
            *((partial(swapped, row), False) for row in (1, 39)),
            # Settings that logits depend on.
            (lambda: make_model(rms_norm_eps=1e-2), False),
            (lambda: make_model(rope_parameters={"rope_type": "default", "rope_theta": 5.0}), False),
        ],
    )
    def test_what_it_tells_apart(self, make, is_same):
        assert (weights_digest(make()) == weights_digest(make_model())) == is_same

    def test_of_the_base_under_an_adapter(self):
        saved = {"modules_to_save": ["lm_head"], "trainable_token_indices": [3]}
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **saved)
        policy = get_peft_model(make_model(), config)
        assert weights_digest(policy.get_base_model(), without_adapters=True) == weights_digest(make_model())
        assert weights_digest(policy.get_base_model()) != weights_digest(make_model())

    def test_offloaded(self, tmp_path):
        model = make_model()
        disk_offload(model, str(tmp_path), execution_device=CPU)
        assert weights_digest(model) == weights_digest(make_model())
        assert model.lm_head.weight.is_meta  # it was put back


def test_a_weight_that_is_nan_has_not_moved():
    model = make_model()
    model.lm_head.weight.data.fill_(math.nan)
    assert not have_moved(sample_weights(named_weights(model)), sample_weights(named_weights(model)))


PLACES = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
EMBEDDING, *LAYERS, NORM, _, HEAD = PLACES


def hooked(offload, **kwargs):
    model = make_model()
    offload(model, execution_device=CPU, **kwargs)
    return model


class TestOffloaded:
    @pytest.mark.parametrize(
        ("on_disk", "tied"),
        [
            *(([], False), ([HEAD], False), ([EMBEDDING], False), (LAYERS, False)),
            *(([EMBEDDING, HEAD, NORM], False), ([EMBEDDING, HEAD], True)),
        ],
        ids=str,
    )
    def test_by_a_device_map(self, on_disk, tied, tmp_path):
        make_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
        places = {name: "disk" if name in on_disk else "cpu" for name in PLACES}
        settings = {"device_map": places, "offload_folder": str(tmp_path / "off")}
        assert_scored(AutoModelForCausalLM.from_pretrained(tmp_path, **settings))

    @pytest.mark.parametrize(
        ("offload", "kwargs"),
        [
            (cpu_offload, {}),
            (cpu_offload, {"offload_buffers": True}),
            (cpu_offload, {"preload_module_classes": ["LlamaDecoderLayer"]}),
            (cpu_offload, {"preload_module_classes": ["LlamaModel"]}),
            (disk_offload, {}),
            (cpu_offload_with_hook, {}),  # as a whole
        ],
    )
    def test_by_hooks(self, offload, kwargs, tmp_path):
        assert_scored(hooked(offload, **kwargs, **({"offload_dir": str(tmp_path)} if offload is disk_offload else {})))

    def test_loaded_once_for_the_head(self, monkeypatch):
        model = hooked(cpu_offload)
        loads = []
        load = model.lm_head._hf_hook.pre_forward
        monkeypatch.setattr(model.lm_head._hf_hook, "pre_forward", lambda *args: loads.append(1) or load(*args))
        scorer = FrozenScorer(LoadedModel(model))
        row = Rendered(list(range(5)), [7] * 600, list(range(600)), finished=True)
        scorer([row])
        loads.clear()
        scorer([row])
        assert len(loads) == 1  # for two blocks of 512 tokens

    def test_what_no_module_loads_is_refused(self):
        with torch.device("meta"):
            never_loaded = make_model()
        for model in (hooked(cpu_offload, preload_module_classes=["LlamaForCausalLM"]), never_loaded):
            with pytest.raises(ValueError, match=r"`meta` device \(backbone.embed_tokens.weight.*`from_pretrained`"):
                LoadedModel(model)


class Int8Weight(torch.Tensor):
    """A weight as quantisation libraries make them (torchao): a tensor that is computed from others."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, *_):
        return cls(tensors["codes"], tensors["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return return_and_correct_aliasing(func, args, kwargs or {}, cls(args[0].codes, args[0].scale))
        if func not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.t.default):
            raise NotImplementedError(f"{func} of a quantised weight")  # as theirs raise, for slices or `flatten`
        return func(
            *(a.codes.to(a.scale.dtype) * a.scale if isinstance(a, cls) else a for a in args), **(kwargs or {})
        )


def quantise(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().amax(dim=1, keepdim=True) / 127
            codes = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Int8Weight(codes, scale), requires_grad=False)
    return model


def parametrise(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    return model


class TestNotPlain:
    @pytest.mark.parametrize("change", [quantise, parametrise])
    def test_scored_by_their_own_modules(self, change):
        model = change(make_model())
        assert_scored(model)
        with pytest.raises(AssertionError):  # which is not what the plain model gives
            for prompt, completion in ROWS:
                torch.testing.assert_close(
                    state_logits(model, prompt, completion), state_logits(make_model(), prompt, completion)
                )

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    def test_modules_without_parameters(self):
        # Its scale is of the whole activation, so that a row alone in a pass is what can be compared.
        model = torch.ao.quantization.quantize_dynamic(make_model(), {nn.Linear}, dtype=torch.qint8)
        scorer = FrozenScorer(LoadedModel(model))
        (stats,) = scorer([Rendered([5, 6, 7], [8, 9, 1], [0, 1, 2], finished=False)])
        reference = scores_from_logits(state_logits(model, [5, 6, 7], [8, 9, 1]), [8, 9, 1], alpha=1.0)
        assert stats.log_probs.tolist() == pytest.approx(reference.log_probs, abs=0.1)

    def test_quantised_codes_that_a_kernel_rearranges(self):
        model = quantise(make_model())
        placement = LoadedModel(model)
        weight = model.lm_head.weight
        weight.codes = weight.codes.flip(0)
        with placement.active():
            pass
        weight.scale.mul_(2)
        with pytest.raises(RuntimeError, match="has changed since"), placement.active():
            pass


def test_a_family_whose_base_model_is_itself():
    # Its `base_model_prefix` is of the model that reads images too.
    torch.manual_seed(0)
    config = Llama4TextConfig(
        **SIZES,
        intermediate_size_mlp=32,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        initializer_range=0.3,
        attention_chunk_size=4,
        pad_token_id=None,
    )
    model = Llama4ForCausalLM(config).eval()
    assert model.base_model is model
    assert backbone(model) is model.model
    assert_scored(model)
