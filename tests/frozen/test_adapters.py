# SPDX-License-Identifier: Apache-2.0
"""
Adapters as frozen models: from a folder, as a `PeftModel`, and as a named adapter of the policy that is trained. The
reference is the `PeftModel` itself, run on one row at a time.
"""

import pickle

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

from endotrl import EndogenousReward

from ..support.reference import completion_log_probs
from ..support.trainers import history, make_trainer


LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 8},
    "head saved whole": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]},
    "embeddings and head saved whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "some tokens": {"trainable_token_indices": [3, 5], "target_modules": ["q_proj"]},
}
PROMPTS, COMPLETIONS = ["The capital of", "a"], ["France is Paris.", "b"]


def randomise(model):
    """As if it had been trained."""
    torch.manual_seed(0)
    for _, weight in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


def save_adapter(base, folder, tokenizer=None, **config):
    """A trained adapter in a folder, and the model with it; grown, if a tokenizer is given."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if tokenizer is not None:
        model.resize_token_embeddings(len(tokenizer))
        tokenizer.save_pretrained(folder)
    policy = randomise(get_peft_model(model, LoraConfig(**{**LORA, **config})))
    policy.save_pretrained(folder)
    return policy


def expected(model, tokenizer):
    """log pi(y|x), one row at a time."""
    values = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
        values.append(sum(completion_log_probs(model, tokenizer(prompt)["input_ids"], ids)))
    return pytest.approx(values, abs=1e-3)


class TestPaths:
    @pytest.mark.parametrize("kind", KINDS)
    def test_kinds(self, tiny_model_path, tokenizer, tmp_path, kind):
        adapted = save_adapter(tiny_model_path, tmp_path, **KINDS[kind])
        reward = EndogenousReward(str(tmp_path))
        values = reward(PROMPTS, COMPLETIONS)
        assert values == expected(adapted, tokenizer)
        assert values != pytest.approx(EndogenousReward(tiny_model_path)(PROMPTS, COMPLETIONS), abs=0.1)
        assert reward.config._name_or_path == str(tmp_path)  # by which scored files know it
        again = pickle.loads(pickle.dumps(reward))
        assert again(PROMPTS, COMPLETIONS) == values
        assert not any(weight.requires_grad for weight in reward.model.parameters())

    def test_new_tokens(self, tiny_model_path, tokenizer, tmp_path):
        tokenizer.add_tokens(["France"])
        adapted = save_adapter(tiny_model_path, tmp_path, tokenizer, modules_to_save=["embed_tokens", "lm_head"])
        reward = EndogenousReward(str(tmp_path))
        assert reward(PROMPTS, COMPLETIONS) == expected(adapted, tokenizer)
        assert len(reward.processing_class) == len(tokenizer) == reward.config.vocab_size

    def test_of_another_base(self, tiny_model_path, tiny_policy_path, tmp_path):
        save_adapter(tiny_model_path, tmp_path)
        config = tmp_path / "adapter_config.json"
        config.write_text(config.read_text().replace(tiny_model_path, tiny_policy_path))
        with pytest.raises((OSError, RuntimeError), match="size mismatch|lacks weights"):
            EndogenousReward(str(tmp_path)).load()
        config.write_text(config.read_text().replace(tiny_policy_path, "/nowhere"))
        with pytest.raises(OSError, match="'/nowhere', the base model of the adapter .* cannot be loaded"):
            EndogenousReward(str(tmp_path))

    def test_weights_that_are_not_there(self, tiny_model_path, tmp_path):
        from safetensors.torch import load_file, save_file

        save_adapter(tiny_model_path, tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        weights = load_file(path)
        del weights[sorted(weights)[0]]
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(OSError, match="lacks weights: .*lora_A"):
            EndogenousReward(str(tmp_path)).load()

    def test_virtual_tokens(self, tiny_model_path, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
        policy = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        policy.save_pretrained(tmp_path)
        for given in (str(tmp_path), policy):
            with pytest.raises(ValueError, match="prepends virtual tokens to the prompt"):
                EndogenousReward(given)

    def test_activated_lora(self, tiny_model_path, tmp_path):
        """Off until its invocation tokens, which only the `PeftModel` looks for."""
        policy = save_adapter(tiny_model_path, tmp_path, alora_invocation_tokens=[5])
        for given in (str(tmp_path), policy):
            with pytest.raises(ValueError, match="is an activated LoRA"):
                EndogenousReward(given)

    def test_of_another_task(self, tiny_model_path, tmp_path):
        save_adapter(tiny_model_path, tmp_path, task_type="FEATURE_EXTRACTION")
        with pytest.raises(ValueError, match="has the task type 'FEATURE_EXTRACTION'"):
            EndogenousReward(str(tmp_path))


class TestInstances:
    def test_frozen_with_its_adapter_on(self, tiny_model_path, tokenizer, tmp_path):
        save_adapter(tiny_model_path, tmp_path)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), tmp_path)
        reward = EndogenousReward(model, tokenizer)
        values = reward(PROMPTS, COMPLETIONS)
        assert values == expected(model, tokenizer)
        with model.disable_adapter():  # it is switched on for the reward
            assert reward(PROMPTS, COMPLETIONS) == values
            assert model.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters
        with pytest.raises(TypeError, match="its adapter, .*with that path"):
            pickle.dumps(reward)
        with torch.no_grad():
            next(weight for name, weight in model.named_parameters() if "lora_B" in name).add_(0.1)
        with pytest.raises(RuntimeError, match="has changed since"):
            reward(PROMPTS, COMPLETIONS)

    def test_named_adapter_of_a_policy(self, tiny_model_path, tokenizer, tmp_path):
        save_adapter(tiny_model_path, tmp_path)
        policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_path), LoraConfig(**LORA))
        policy.load_adapter(tmp_path, "judge")
        trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
        reward = EndogenousReward(policy, tokenizer, adapter_name="judge")
        expected_values = EndogenousReward(str(tmp_path))(PROMPTS, COMPLETIONS)
        assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected_values, abs=1e-4)
        assert policy.active_adapters == ["default"]
        assert {name for name, weight in policy.named_parameters() if weight.requires_grad} == trained
        with pytest.raises(ValueError, match="`adapter_name` is 'other', but it must be one of 'default', 'judge'"):
            EndogenousReward(policy, adapter_name="other")
        with pytest.raises(ValueError, match="requires a `PeftModel`"):
            EndogenousReward(tiny_model_path, adapter_name="judge")


@pytest.mark.slow
@pytest.mark.parametrize("goes_on", [False, True])
def test_an_adapter_of_a_policy_during_training(goes_on, tiny_policy_path, tmp_path):
    """A named one beside that which is trained; or, where one trains on, its start, TRL's adapter "ref"."""
    save_adapter(tiny_policy_path, tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path)
    by_path = EndogenousReward(str(tmp_path / "judge"), tokenizer, name="by_path")
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
    if goes_on:
        policy = PeftModel.from_pretrained(policy, tmp_path / "judge", is_trainable=True)
        reward = EndogenousReward(None)
    else:
        policy = get_peft_model(policy, LoraConfig(**LORA))
        policy.load_adapter(tmp_path / "judge", "judge")
        reward = EndogenousReward(policy, tokenizer, adapter_name="judge")
    settings = {"learning_rate": 0.05, "logging_steps": 1, "beta": 0.1 if goes_on else 0.0}
    trainer = make_trainer(GRPOTrainer, policy, tmp_path / "run", [reward, by_path], **settings)
    if goes_on:
        assert "adapter 'ref'" in repr(reward.attach(trainer))
    before = {name: (weight.clone(), weight.requires_grad) for name, weight in policy.named_parameters()}
    trainer.train()
    ours, theirs = (history(trainer, f"rewards/{name}/mean") for name in ("endogenous_reward", "by_path"))
    assert ours == pytest.approx(theirs, abs=1e-4) and len(ours) == 2
    after = dict(policy.named_parameters())
    assert {name: weight.requires_grad for name, weight in after.items()} == {n: b for n, (_, b) in before.items()}
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name][0])}
    assert moved and all(".default." in name for name in moved)
    if goes_on:
        with pytest.raises(ValueError, match="was made for the model"):
            EndogenousReward(tiny_policy_path).attach(trainer)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens"]}),
        LoraConfig(**{**LORA, **KINDS["some tokens"]}),
        IA3Config(task_type="CAUSAL_LM"),
    ],
    ids=["embeddings", "some tokens", "IA3"],
)
def test_a_start_that_trl_copies_in_part(config, tiny_policy_path, tmp_path):
    """TRL looks for `.default.` in the names of parameters; others stay random, or at zero, in its "ref"."""
    policy = randomise(get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_policy_path), config))
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path)
    trainer = make_trainer(GRPOTrainer, policy, tmp_path, EndogenousReward(None), beta=0.1, processing_class=tokenizer)
    with pytest.raises(ValueError, match="'ref', is not the adapter that training starts from"):
        EndogenousReward(None).attach(trainer)


class TestInitKwargs:
    def test_reach_the_model(self, tiny_model_path, tmp_path):
        save_adapter(tiny_model_path, tmp_path)
        for name in (tiny_model_path, str(tmp_path)):
            kwargs = {"attn_implementation": "eager", "dtype": "bfloat16", "device_map": {"": "cpu"}}
            reward = EndogenousReward(name, model_init_kwargs=kwargs)
            assert reward.model.config._attn_implementation == "eager"
            assert reward.model.get_input_embeddings().weight.dtype == torch.bfloat16
            plain = EndogenousReward(name, dtype="bfloat16")(PROMPTS, COMPLETIONS)
            assert reward(PROMPTS, COMPLETIONS) == pytest.approx(plain, abs=1.0)

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"dtype": "float32", "model_init_kwargs": {"dtype": "bfloat16"}}, "Set only one of them"),
            ({"model_init_kwargs": {"trust_remote_code": True}}, "a separate argument"),
            ({"model_init_kwargs": {"device_map": "auto"}, "device": "cpu"}, "places the weights"),
            ({"model_init_kwargs": {"device_map": "auto"}, "offload": True}, "places the weights"),
            ({"model_init_kwargs": {"dtype": "int3"}}, "must be"),
        ],
    )
    def test_contradictions(self, tiny_model_path, settings, match):
        with pytest.raises(ValueError, match=match):
            EndogenousReward(tiny_model_path, **settings)

    def test_of_a_loaded_model(self, tiny_model_path):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
        with pytest.raises(ValueError, match="already loaded"):
            EndogenousReward(model, model_init_kwargs={"revision": "main"})
