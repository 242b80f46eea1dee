# SPDX-License-Identifier: Apache-2.0
"""
All chat templates that TRL knows: text and token ids of one completion have one reward, that of what the policy wrote.
"""

import re
from pathlib import Path

import pytest
import torch
import trl
from transformers import LlamaConfig, LlamaForCausalLM

from endotrl import EndogenousReward
from endotrl.rendering.renderer import Renderer

from ..support.helpers import SMALL, encode
from ..support.reference import completion_log_probs
from .tokenizers_of_all_kinds import byte_level


TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
NAMES = [path.stem for path in TEMPLATES]
EOS = "<|endoftext|>"
# How each family ends a turn, read off its template by hand. GLM's ends with nothing, in training with the next role.
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": EOS,
    "glm4moe_training": "<|user|>",
    "gptoss": "<|return|>",
    **dict.fromkeys(("idefics3", "smolvlm"), "<end_of_utterance>"),
    **dict.fromkeys(("lfm2", "nemotron", "qwen"), "<|im_end|>"),
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "phi3": "<|end|>",
}
PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")
SPECIAL = re.compile(r"<[|｜][^<>{}'\"\s]+[|｜]>|<[a-z]+_of_[a-z]+>|</s>|<\|?turn\|?>|<\|?tool_(?:call|response)\|?>")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
RESULT = {"role": "tool", "name": "add", "content": "4"}
# Templates that write calls of tools, and before them nothing, or what stands here.
FILLED = {
    r"qwen2_5(_training)?$|qwen3_(instruct|vl|5_nothink)|lfm2_2_5|gemma4|diffusion_gemma|gptoss": "",
    r"qwen3(_training)?$": "<think>\n\n</think>\n\n",
    r"qwen3_(5_think|6|8)": "\n</think>\n\n",
    r"glm4moe": "\n<think></think>\n",
}
CALLERS = {name: before for names, before in FILLED.items() for name in NAMES if re.match(names, name)}


def tokenizer_for(name):
    template = TEMPLATES[NAMES.index(name)].read_text(encoding="utf-8")
    special = {*SPECIAL.findall(template), "<|im_end|>"} - {EOS}
    return byte_level([EOS, *sorted(special)], EOS, template)


def end_of(name):
    return ENDS[max((family for family in ENDS if name.startswith(family)), key=len)]


def content(name, text):
    return [{"type": "text", "text": text}] if name.startswith(PARTS_ONLY) else text


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, **SMALL, "max_position_embeddings": 4096, "initializer_range": 0.5}
    return LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=0)).eval()


def test_the_hand_written_tables():
    assert len(NAMES) >= 70 and all(end_of(name) for name in NAMES) and len(CALLERS) >= 25


@pytest.mark.parametrize("name", NAMES)
def test_text_and_ids_of_an_answer(name, model):
    tokenizer = tokenizer_for(name)
    reward = EndogenousReward(model, tokenizer, token_reward="log_prob")

    def say(role, text):
        return {"role": role, "content": content(name, text)}

    question, answer = say("user", "Where?"), say("assistant", "It is in Paris.")
    prompts = [[question], [question, say("assistant", "<think>\nHm.\n</think>\n\n12"), question]]
    if name not in ("gemma", "gemma_training"):  # they have no system role
        prompts.append([say("system", "Be brief.\n"), question])
    ids = encode(tokenizer, "It is in Paris." + end_of(name))
    for prompt in prompts:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        expected = sum(completion_log_probs(model, encode(tokenizer, text), ids))
        assert reward([prompt], [[answer]]) == pytest.approx([expected], abs=1e-3)
        assert reward([prompt], [[answer]], [ids]) == pytest.approx([expected], abs=1e-3)


@pytest.mark.parametrize("name", CALLERS)
def test_text_and_ids_of_a_call(name):
    tokenizer = tokenizer_for(name)
    prompt = [{"role": "user", "content": "2 + 2?"}]
    call = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    opened = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    closed = tokenizer.apply_chat_template([*prompt, *call], tokenize=False)
    written = closed.removeprefix(opened).removeprefix(CALLERS[name]).removesuffix("\n")
    assert closed.startswith(opened) and "add" in written
    if name == "glm4moe":  # what a policy stops at is the role of the result
        written += "<|observation|>"
    stops = tokenizer.convert_tokens_to_ids([EOS, *(["<|observation|>"] if name.startswith("glm") else [])])
    renderer = Renderer(tokenizer, stops, len(tokenizer))
    (as_text,) = renderer.render([prompt], [call])
    assert tokenizer.decode(as_text.completion_ids) == written
    (as_ids,) = renderer.render([prompt], [call], [encode(tokenizer, written)])
    assert as_text == as_ids and as_text.finished


@pytest.mark.parametrize("name", [name for name in CALLERS if not CALLERS[name] and name != "gptoss"])
def test_text_and_ids_of_a_conversation(name):
    tokenizer = tokenizer_for(name)
    prompt = [{"role": "user", "content": "2 + 2?"}]
    completion = [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        RESULT,
        {"role": "assistant", "content": "It is 4."},
    ]
    renderer = Renderer(tokenizer, [tokenizer.eos_token_id], len(tokenizer))
    (row,) = renderer.render([prompt], [completion])
    whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    assert tokenizer.decode(row.prompt_ids + row.completion_ids) == whole.removesuffix("\n")
    runs = tokenizer.decode([row.completion_ids[i] for i in row.action_positions])
    # Gemma 4 ends calls with what opens their results.
    call = runs.removesuffix("It is 4." + end_of(name)).removesuffix("<|tool_response>")
    assert call != runs and "add" in call
    assert not any(word in call for word in ("tool_response", "assistant", "<|turn>"))
    (as_ids,) = renderer.render([prompt], [completion], [row.completion_ids])
    assert as_ids == row
