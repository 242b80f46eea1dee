# SPDX-License-Identifier: Apache-2.0
"""
Whose weights are used, and that they stay as they are. Sharing with trainers: `tests/rewards/test_trl_integration.py`.
"""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from endotrl.frozen.loaded_model import LoadedModel
from endotrl.frozen.names import load_config
from endotrl.frozen.own_copy import OwnCopy, resolve_dtype


SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "eos_token_id": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def make_model(**config):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **config))


def use(placement):
    with placement.active() as model:
        return model


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("float32", "cuda", torch.float32),
        ("float16", "cpu", torch.float16),
        (torch.float64, "cpu", torch.float64),
    ],
)
def test_dtypes(dtype, device, expected):
    assert resolve_dtype(dtype, torch.device(device)) == expected


class TestOwnCopy:
    def test_loads_on_first_use_and_once(self, tiny_model_path):
        placement = OwnCopy(tiny_model_path)
        assert placement._model is None
        model = use(placement)
        assert use(placement) is model
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_dtype_is_not_the_configs(self, tiny_model_path, tmp_path):
        AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.bfloat16).save_pretrained(tmp_path)
        assert use(OwnCopy(str(tmp_path))).dtype == torch.float32  # "auto" on this CPU
        assert use(OwnCopy(tiny_model_path, dtype="bfloat16", device="cpu")).dtype == torch.bfloat16

    def test_ends_of_a_response(self, tiny_model_path, tmp_path):
        assert OwnCopy(tiny_model_path).eos_token_ids == [1]
        model = make_model()
        model.generation_config.eos_token_id = [1, 7, 9]  # as Llama 3 has
        model.save_pretrained(tmp_path / "three")
        assert OwnCopy(str(tmp_path / "three")).eos_token_ids == [1, 7, 9]
        (tmp_path / "three" / "generation_config.json").unlink()
        assert OwnCopy(str(tmp_path / "three")).eos_token_ids == [1]  # the model's config
        make_model().save_pretrained(tmp_path / "none")
        for file in ("config.json", "generation_config.json"):
            text = (tmp_path / "none" / file).read_text()
            (tmp_path / "none" / file).write_text(text.replace('"eos_token_id": 1', '"eos_token_id": null'))
        assert OwnCopy(str(tmp_path / "none")).eos_token_ids == []

    @pytest.mark.parametrize("is_fsdp2", [None, True, False], ids=["whole", "FSDP2", "ZeRO-3"])
    def test_a_checkpoint_that_lacks_weights(self, is_fsdp2, tmp_path):
        model = make_model()
        model.save_pretrained(
            tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "layers.1" not in k}
        )
        placement = OwnCopy(str(tmp_path))
        if is_fsdp2 is not None:
            placement.shard(SimpleNamespace(is_fsdp2=is_fsdp2, device=torch.device("cpu")))
        with pytest.raises(OSError, match=r"lacks weights: model\.layers\.1\.input_layernorm\.weight, "):
            use(placement)

    @pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder", ""])
    def test_unknown_model(self, name):
        with pytest.raises(OSError, match=f"frozen model '{name}' cannot be loaded.*Check the name.*Reason:"):
            OwnCopy(name)

    def test_a_folder_without_a_model(self, tmp_path):
        with pytest.raises(OSError, match="cannot be loaded. It must be a folder with a valid `config.json`"):
            load_config(str(tmp_path))
        (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
        with pytest.raises(OSError, match="cannot be loaded.*no-such-family"):
            load_config(str(tmp_path))


def step(optimizer, **kwargs):
    def change(model):
        loss = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
        loss.backward()
        optimizer(model.parameters(), lr=1e-3, **kwargs).step()

    return change


def add_adapter(model, **kwargs):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **kwargs))


class TestLoadedModel:
    CHANGES = {
        "SGD": step(torch.optim.SGD),
        "AdamW": step(torch.optim.AdamW),
        "AdamW foreach": step(torch.optim.AdamW, foreach=True),
        "AdamW fused": step(torch.optim.AdamW, fused=True),
        "adapter": add_adapter,
        "merged adapter": lambda model: add_adapter(model, init_lora_weights=False).merge_and_unload(),
        ".data": lambda model: model.lm_head.weight.data.add_(0.01),
        "resize": lambda model: model.resize_token_embeddings(41),
        "load": lambda model: model.load_state_dict({k: v + 1e-3 for k, v in model.state_dict().items()}),
        "dtype": lambda model: model.to(torch.bfloat16),
    }

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_a_changed_model_is_refused(self, change):
        model = make_model()
        placement = LoadedModel(model)
        use(placement)
        change(model)
        with pytest.raises(RuntimeError, match=r"has changed since.*Pass a path.*`reward.attach\(trainer\)`"):
            use(placement)

    @pytest.mark.parametrize(
        "harmless",
        [
            lambda model: model.train(),
            lambda model: model.requires_grad_(False),
            lambda model: model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward(),
            lambda model: model.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False),
            lambda model: model.state_dict(),
        ],
        ids=["train mode", "requires_grad", "backward", "generate", "state_dict"],
    )
    def test_what_changes_no_weight_is_allowed(self, harmless):
        model = make_model()
        placement = LoadedModel(model)
        harmless(model)
        assert use(placement) is model

    def test_evaluation_mode_inside_and_the_same_modes_after(self):
        model = make_model(attention_dropout=0.5).train()
        for module in (model.model.layers[0], model.model.norm):
            module.eval()  # a part that the user keeps in evaluation mode
        before = {name: module.training for name, module in model.named_modules()}
        assert set(before.values()) == {True, False}
        with pytest.raises(ZeroDivisionError), LoadedModel(model).active() as active:
            assert active is model
            assert not any(module.training for module in model.modules())
            raise ZeroDivisionError  # after an error, too
        assert {name: module.training for name, module in model.named_modules()} == before

    @pytest.mark.parametrize(("given", "ends"), [(1, [1]), ([1, 7], [1, 7]), (None, [])])
    def test_the_ends_are_those_of_the_generation_config(self, given, ends):
        model = make_model()
        model.generation_config.eos_token_id = given
        assert LoadedModel(model).eos_token_ids == ends


@pytest.mark.parametrize("model_class", [hf.LlamaModel, hf.LlamaForSequenceClassification])
def test_a_model_without_a_head(model_class):
    with pytest.raises(ValueError, match=f"The {model_class.__name__} given has no LM head.*causal"):
        LoadedModel(model_class(LlamaConfig(**SIZES)))


def test_an_encoder_decoder(tmp_path):
    config = hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an encoder-decoder model.*`AutoModelForCausalLM`"):
        OwnCopy(str(tmp_path))
    with pytest.raises(ValueError, match="The T5ForConditionalGeneration given is an encoder-decoder model"):
        LoadedModel(hf.T5ForConditionalGeneration(config))
