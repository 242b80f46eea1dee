# SPDX-License-Identifier: Apache-2.0
"""
What chat templates make of messages, over all templates that TRL ships: written in the form that they read, or
refused.
"""

from pathlib import Path
from typing import Any

import pytest
import trl
from trl.chat_template_utils import get_training_chat_template

from endotrl.rendering.messages import Template, add_criterion
from endotrl.rendering.renderer import Renderer


FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
CALL = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 3, "b": 4}}}


def say(role, *texts, parts=False, **keys):
    content: Any = [{"type": "text", "text": text} for text in texts] if parts else "".join(texts)
    return {"role": role, "content": content, **keys}


def conversations(parts):
    """Messages whose texts are single words, which no template has."""
    texts = (("user", "Quagga"), ("user", "Zorilla"), ("assistant", "Okapi"), ("system", "Numbat"))
    user, last, answer, system = (say(role, text, parts=parts) for role, text in texts)
    call, thoughtful_call = (say("assistant", text, parts=parts, tool_calls=[CALL]) for text in ("", "Dugong"))
    tool = say("tool", "Kiwi", parts=parts, name="multiply")
    return [
        [user],
        [system, user],
        [user, answer, last],
        [system, user, answer],
        [user, answer, system, last],
        [user, last],
        [say("developer", "Numbat", parts=parts), user],
        [user, call, tool],
        [user, thoughtful_call, tool],
        [user, thoughtful_call, tool, answer, last],
    ]


@pytest.fixture
def tokenizer(tokenizer):
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


def apply(tokenizer, messages):
    opens = messages[-1]["role"] != "assistant"
    return Template(tokenizer).apply(messages, add_generation_prompt=opens)


def words_of(messages):
    """Of messages that call no tool: before a call, many templates write no text."""
    contents = [message["content"] for message in messages if "tool_calls" not in message]
    return [
        "".join(part["text"] for part in content) if isinstance(content, list) else content for content in contents
    ]


@pytest.mark.parametrize("name", NAMES)
def test_all_that_is_said_is_written(name, tokenizer):
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
    written = 0
    for texts, parts in zip(conversations(parts=False), conversations(parts=True), strict=True):
        for messages in (texts, parts):
            try:
                text = apply(tokenizer, messages)
            except ValueError as error:
                assert "rejects these messages" in str(error) or "leaves out" in str(error)
                continue
            written += 1
            assert all(text.count(word) == 1 for word in words_of(messages)), text
            assert "tool_calls" not in str(messages) or "multiply" in text
            assert "'text'" not in text and '"text"' not in text  # a list of parts
    assert written >= 4  # every template knows users and answers
    # Messages in the form that it reads are given as they are, and the other form says the same.
    parts = name.removesuffix("_training") in ("smolvlm", "idefics3", "llava_next")
    question, other = ([say("user", "What is 3 times 4?", parts=form)] for form in (parts, not parts))
    expected = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert apply(tokenizer, question) == apply(tokenizer, other) == expected


@pytest.mark.parametrize(
    ("name", "messages", "what"),
    [
        ("qwen3", [say("developer", "Be brief."), say("user", "Hi")], r"the text of message 1 \(role 'developer'\)"),
        ("qwen3_vl", [say("user", "Hi"), say("system", "Be brief.")], r"the text of message 2 \(role 'system'\)"),
        ("phi3", [say("user", "Hi"), say("tool", "12", name="multiply")], r"the text of message 2 \(role 'tool'\)"),
        (
            "llama3",
            [say("user", "Hi"), say("assistant", "", tool_calls=[CALL]), say("tool", "12")],
            r"the tool call of message 2 \(role 'assistant'\)",
        ),
    ],
)
def test_what_a_template_leaves_out_is_refused(name, messages, what, tokenizer):
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
    with pytest.raises(ValueError, match=f"chat template of '.*tiny-llama' leaves out {what}.*`processing_class`"):
        apply(tokenizer, messages)


def test_parts_of_one_message_are_joined_where_only_the_first_is_read(tokenizer):
    tokenizer.chat_template = (FOLDER / "llava_next.jinja").read_text()
    messages = [say("system", "Be ", "brief.", parts=True), say("user", "Hi", parts=True)]
    assert apply(tokenizer, messages) == "<<SYS>>\nBe brief.\n<</SYS>>\n\n[INST] Hi [/INST]"
    assert messages[0]["content"] == say("system", "Be ", "brief.", parts=True)["content"]  # the dataset's own stay


def test_some_messages_as_text_and_some_as_parts(tokenizer):
    mixed = [say("system", "Be brief."), say("user", "What ", "is it?", parts=True)]
    assert apply(tokenizer, mixed) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_a_template_does_to_texts_is_its_own_affair(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content.split('</think>')[-1] | trim + '\n' }}{% endfor %}"
    )
    messages = [say("user", "  Hi "), say("assistant", "<think>Hm.</think>Hello."), say("user", "\n")]
    assert Template(tokenizer).apply(messages, add_generation_prompt=True) == "user: Hi\nassistant: Hello.\nuser: \n"


def test_a_template_for_certain_texts_only(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].content not in ('yes', 'no') %}{{ raise_exception('yes or no') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    assert apply(tokenizer, [say("user", "yes")]) == "yes"
    with pytest.raises(ValueError, match="rejects these messages: yes or no"):
        apply(tokenizer, [say("user", "maybe")])


@pytest.mark.parametrize("content", [None, "", []], ids=["none", "empty", "no parts"])
def test_nothing_said_is_nothing_left_out(content, tokenizer):
    tokenizer.chat_template = (FOLDER / "qwen3.jinja").read_text()
    messages = [say("user", "Hi"), {"role": "assistant", "content": content, "tool_calls": [CALL]}, say("tool", "12")]
    assert "multiply" in apply(tokenizer, messages)


def test_a_template_that_drops_the_criterion(tokenizer):
    # It says nothing of roles that it does not know.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.role + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"
    )
    messages = add_criterion([say("user", "Capital of France?")], "Be exact.")
    with pytest.raises(ValueError, match=r"leaves out the text of message 1 \(role 'system'\).*criterion"):
        Template(tokenizer).apply(messages, True, has_criterion=True)


class TestPrefixPreserving:
    """Completions of several messages are written by a template that does not rewrite earlier turns."""

    def test_a_template_of_which_trl_has_another_version(self, tokenizer):
        tokenizer.chat_template = (FOLDER / "qwen3.jinja").read_text()
        training = get_training_chat_template(tokenizer)
        prompt, call = [say("user", "3 times 4?")], say("assistant", "", tool_calls=[CALL])
        turns = [call, say("tool", "12", name="multiply"), say("assistant", "It is 12.")]
        row, trained = (
            Renderer(tokenizer, [tokenizer.eos_token_id], len(tokenizer), chat_template_kwargs=kwargs).render(
                [prompt], [turns]
            )[0]
            for kwargs in (None, {"chat_template": training})
        )
        assert row == trained
        written = [row.completion_ids[i] for i in row.action_positions]
        call = '<tool_call>\n{"name": "multiply", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>'
        assert tokenizer.decode(written) == call + "It is 12.<|im_end|>"

    def test_others_stay(self, tokenizer):
        template = Template(tokenizer)  # ChatML, which TRL has no version of
        assert template.prefix_preserving is template
        tokenizer.chat_template = (FOLDER / "qwen3_instruct_2507.jinja").read_text()
        template = Template(tokenizer)
        assert template.prefix_preserving is template
        template = Template(tokenizer, {"chat_template": (FOLDER / "qwen3.jinja").read_text()})
        assert template.prefix_preserving is template  # it was asked for
