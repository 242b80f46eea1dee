# SPDX-License-Identifier: Apache-2.0
"""What is scored: every expected sequence is written out by hand and encoded piece by piece."""

import logging
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from endotrl.rendering.ends import positions_outside
from endotrl.rendering.messages import add_criterion
from endotrl.rendering.offsets import decode_with_offsets
from endotrl.rendering.renderer import Renderer

from ..support.reference import chatml


EOS = 1
USER = [{"role": "user", "content": "Capital of France?"}]
PARIS = [{"role": "assistant", "content": "Paris."}]

# A finished turn loses its reasoning and an open one starts it, as DeepSeek's and Qwen's reasoning templates do.
THINK_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('</think>')[-1].lstrip() + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
NO_END_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# As Gemma 2's.
NO_SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + NO_END_TEMPLATE
)


@pytest.fixture
def tokenizer(tiny_model_path):
    """A new one for every test: many change it."""
    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.fixture(scope="module")
def shared_tokenizer(tiny_model_path):
    return AutoTokenizer.from_pretrained(tiny_model_path)


def encode(tokenizer, *pieces):
    """Encodes each piece for itself, so that no token reaches from one into the next."""
    return [token_id for piece in pieces for token_id in tokenizer(piece, add_special_tokens=False)["input_ids"]]


def letter_by_letter(tokenizer, text):
    """Not how the tokenizer would write `text`, but a policy may sample it."""
    return encode(tokenizer, *text)


def make_renderer(tokenizer, **kwargs):
    return Renderer(tokenizer, **{"eos_token_ids": [EOS], "vocab_size": 308, **kwargs})


@pytest.fixture
def warnings_logged(caplog):
    with caplog.at_level(logging.WARNING, logger="endotrl"):
        yield caplog


class TestPrompts:
    @pytest.mark.parametrize(
        "messages",
        [
            USER,
            [{"role": "system", "content": "Be brief."}, *USER],
            [*USER, {"role": "assistant", "content": "Rome."}, {"role": "user", "content": "Sure? 😀"}],
        ],
        ids=["one turn", "system", "several turns"],
    )
    def test_messages(self, tokenizer, messages):
        (row,) = make_renderer(tokenizer).render([messages], [PARIS])
        assert tokenizer.decode(row.prompt_ids) == chatml(messages, generation_prompt=True)
        assert row.prompt_ids == encode(tokenizer, chatml(messages, generation_prompt=True))
        assert row.completion_ids == [*encode(tokenizer, "Paris."), EOS]

    @pytest.mark.parametrize("padding_side", ["left", "right"])
    def test_padding_side_and_pad_token_do_not_matter(self, tokenizer, padding_side):
        tokenizer.padding_side = padding_side
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
        long, short = make_renderer(tokenizer).render(["The capital of France is", "Hi"], [" Paris.", " you"])
        assert long.prompt_ids == encode(tokenizer, "The capital of France is")
        assert short.prompt_ids == encode(tokenizer, "Hi")
        assert short.completion_ids == [*encode(tokenizer, " you"), EOS]  # its EOS is an action, not padding

    def test_plain_text_gets_the_special_tokens_of_the_tokenizer_once(self, tokenizer):
        bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
        )
        (row,) = make_renderer(tokenizer).render(["What is"], [" Paris?"])
        assert row.prompt_ids == [bos, *encode(tokenizer, "What is")]
        assert row.completion_ids == [*encode(tokenizer, " Paris?"), EOS]
        # The template writes its own special tokens: no second BOS.
        (row,) = make_renderer(tokenizer).render([USER], [PARIS])
        assert row.prompt_ids == encode(tokenizer, chatml(USER, generation_prompt=True))
        # With a BOS, an empty prompt is a context.
        (row,) = make_renderer(tokenizer).render([""], ["Paris"])
        assert row.prompt_ids == [bos]

    def test_without_bos_an_empty_prompt_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="prompt of row 1 renders to no token.*no BOS.*Give it a prompt"):
            make_renderer(tokenizer).render(["Hi", ""], ["a", "b"])

    def test_template_arguments(self, tokenizer):
        tokenizer.chat_template = "{{ mood }}:" + NO_END_TEMPLATE
        renderer = make_renderer(tokenizer, chat_template_kwargs={"mood": "calm"})
        (row,) = renderer.render([USER], [PARIS])
        assert tokenizer.decode(row.prompt_ids) == "calm:user: Capital of France?\nassistant: "

    def test_rows_of_a_group_and_their_neighbours(self, tokenizer):
        other = [{"role": "user", "content": "Capital of Italy?"}]
        prompts = [USER, other, USER, USER]
        completions = ["Paris.", "Rome.", "", "Lyon"]
        together = make_renderer(tokenizer).render(prompts, completions)
        alone = [make_renderer(tokenizer).render([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
        assert together == alone


class TestCriterion:
    def test_becomes_the_system_message(self, tokenizer):
        (row,) = make_renderer(tokenizer).render([USER], [PARIS], criteria=["Be exact."])
        expected = chatml([{"role": "system", "content": "Be exact."}, *USER], generation_prompt=True)
        assert tokenizer.decode(row.prompt_ids) == expected
        assert row.completion_ids == [*encode(tokenizer, "Paris."), EOS]

    def test_joins_a_system_message_that_is_there(self, tokenizer):
        prompt = [{"role": "system", "content": "You are a poet."}, *USER]
        (row,) = make_renderer(tokenizer).render([prompt], [PARIS], criteria=["Be exact."])
        system = {"role": "system", "content": "Be exact.\n\nYou are a poet."}
        assert tokenizer.decode(row.prompt_ids) == chatml([system, *USER], generation_prompt=True)
        assert prompt[0]["content"] == "You are a poet."  # the dataset's own message stays

    def test_opens_a_plain_prompt(self, tokenizer):
        (row,) = make_renderer(tokenizer).render(["2+2="], ["4"], criteria=["Be exact."])
        assert tokenizer.decode(row.prompt_ids) == "Be exact.\n\n2+2="

    def test_one_a_row(self, tokenizer):
        rows = make_renderer(tokenizer).render([USER] * 3, [PARIS] * 3, criteria=["A", None, "B"])
        texts = [tokenizer.decode(row.prompt_ids) for row in rows]
        plain = chatml(USER, generation_prompt=True)
        assert texts == [
            f"<|im_start|>system\nA<|im_end|>\n{plain}",
            plain,
            f"<|im_start|>system\nB<|im_end|>\n{plain}",
        ]

    @pytest.mark.parametrize("system", [{}, {"content": None}, {"content": ""}], ids=["missing", "none", "empty"])
    def test_joins_an_empty_system_message(self, system):
        joined = add_criterion([{"role": "system", **system}, *USER], "Be exact.")
        assert joined == [{"role": "system", "content": "Be exact."}, *USER]

    def test_joins_a_system_message_of_parts(self):
        parts = [{"type": "text", "text": "You are a poet."}]
        joined = add_criterion([{"role": "system", "content": parts}, *USER], "Be exact.")
        assert joined == [{"role": "system", "content": [{"type": "text", "text": "Be exact.\n\n"}, *parts]}, *USER]
        assert len(parts) == 1  # the dataset's own message stays

    def test_a_template_without_a_system_role(self, tokenizer):
        tokenizer.chat_template = NO_SYSTEM_TEMPLATE
        renderer = make_renderer(tokenizer)
        refusal = r"chat template of '.*tiny-llama' refuses these messages: System role not supported\."
        with pytest.raises(ValueError, match=refusal + ".*criterion.*first user message"):
            renderer.render([USER], [PARIS], criteria=["Be exact."])
        with pytest.raises(ValueError, match=refusal + "$"):
            renderer.render([[{"role": "system", "content": "Be brief."}, *USER]], [PARIS])
        assert renderer.render([USER], [PARIS])[0].finished  # without a system message, nothing is wrong


class TestCompletionsAsText:
    """A completion that is given as text is a complete answer, so its end is scored too."""

    @pytest.mark.parametrize(
        ("prompt", "completion", "pieces"),
        [
            # What the template writes after the end of the turn, a line break, is not an action.
            (USER, "Paris.", ["Paris.<|im_end|>"]),
            (USER, PARIS, ["Paris.<|im_end|>"]),
            ("The capital is", " Paris.", [" Paris.<|im_end|>"]),
            ("The capital is", " Paris.<|im_end|>", [" Paris.<|im_end|>"]),  # an end that is there is not doubled
            ("The capital is", " Rome.<|im_end|> Paris.", [" Rome.<|im_end|>", " Paris.<|im_end|>"]),
            ("The capital is", "", ["<|im_end|>"]),
            (USER, "", ["<|im_end|>"]),
        ],
    )
    def test_with_its_end(self, tokenizer, prompt, completion, pieces):
        (row,) = make_renderer(tokenizer).render([prompt], [completion])
        assert row.completion_ids == encode(tokenizer, *pieces) and row.completion_ids[-1] == EOS
        assert row.action_positions == list(range(len(row.completion_ids)))
        assert row.finished

    def test_no_token_reaches_over_the_border(self, tokenizer):
        # "cap" + "ital" is one token or two when written at once, but the policy could not go back into the prompt.
        joint = encode(tokenizer, "The capital")
        (row,) = make_renderer(tokenizer).render(["The cap"], ["ital"])
        assert row.prompt_ids == encode(tokenizer, "The cap")
        assert row.prompt_ids + row.completion_ids[:-1] != joint  # else this test shows nothing
        assert row.completion_ids == [*encode(tokenizer, "ital"), EOS]

    def test_white_space_at_the_border(self, tokenizer):
        (row,) = make_renderer(tokenizer).render([USER], ["\n\n Paris. "])
        assert row.prompt_ids == encode(tokenizer, chatml(USER, generation_prompt=True))
        assert tokenizer.decode(row.completion_ids) == "\n\n Paris. <|im_end|>"

    def test_a_template_that_does_not_end_turns(self, tokenizer):
        tokenizer.chat_template = NO_END_TEMPLATE
        (row,) = make_renderer(tokenizer).render([USER], [PARIS])
        assert tokenizer.decode(row.prompt_ids) == "user: Capital of France?\nassistant: "
        # What the policy writes: the template's newline stops nothing, EOS does.
        assert tokenizer.decode(row.completion_ids) == "Paris.<|im_end|>"
        assert row.finished

    def test_a_template_that_opens_the_reasoning_and_a_message_with_more_than_content(self, tokenizer):
        # What the policy wrote is in the template's words, and these stand in another turn than the one that it
        # continued.
        tokenizer.chat_template = THINK_TEMPLATE
        completion = [{"role": "assistant", "content": "Paris.", "reasoning_content": "Hm."}]
        with pytest.raises(ValueError, match=r"\['content', 'reasoning_content', 'role'\].*Pass `completion_ids`"):
            make_renderer(tokenizer).render([USER], [completion])

    def test_reasoning_that_the_template_leaves_out(self, tokenizer):
        completion = [{"role": "assistant", "content": "Paris.", "reasoning_content": "Hm."}]
        with pytest.raises(ValueError, match="leaves out the reasoning"):
            make_renderer(tokenizer).render([USER], [completion])

    @pytest.mark.parametrize("content", ["Paris.", [{"type": "text", "text": "Pa"}, {"type": "text", "text": "ris."}]])
    def test_what_the_template_writes_into_a_finished_turn(self, tokenizer, content, warnings_logged):
        # As Qwen3's and Llama 2's: an empty block before the answer, and a space before the end.
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}{{ '<think></think>' }}{% "
            "endif %}"
            "{{ (m['content'] | string).strip() + ' <|im_end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
        )
        renderer = make_renderer(tokenizer)
        for _ in range(2):
            (row,) = renderer.render([USER], [[{"role": "assistant", "content": content}]])
            assert row.completion_ids == [*encode(tokenizer, "Paris."), EOS]
        (record,) = warnings_logged.records
        assert "'<think></think>'" in record.getMessage() and "enable_thinking=False" in record.getMessage()

    def test_a_base_model_whose_eos_does_not_end_turns(self, tokenizer):
        # As Qwen's base models: the template ends a turn with <|im_end|>, the tokenizer's EOS is another token.
        other_eos = tokenizer.convert_tokens_to_ids("<|im_start|>")
        tokenizer.eos_token = "<|im_start|>"
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
        renderer = make_renderer(tokenizer, eos_token_ids=[other_eos])
        turn = [*encode(tokenizer, "Paris."), EOS]
        (as_text,) = renderer.render([USER], [PARIS])
        (as_ids,) = renderer.render([USER], [PARIS], [turn])
        assert as_text == as_ids
        assert (as_text.completion_ids, as_text.finished) == (turn, True)
        # Generation goes on behind the end of the turn, up to an EOS, which may also pad what follows.
        for padding in ([], [other_eos], [other_eos] * 3):
            (row,) = renderer.render([USER], [PARIS], [[*turn, other_eos, *padding]])
            assert (row.completion_ids, row.finished) == ([*turn, other_eos], True)
        # Plain text has no turns.
        (row,) = renderer.render(["The capital is"], [" Paris."])
        assert row.completion_ids == [*encode(tokenizer, " Paris."), other_eos]
        # A turn that the template writes otherwise ends as others do.
        tokenizer.chat_template = THINK_TEMPLATE
        (row,) = make_renderer(tokenizer, eos_token_ids=[other_eos]).render([USER], ["Hm.</think>Paris."])
        assert row.completion_ids == [*encode(tokenizer, "Hm.</think>Paris."), EOS]

    def test_a_template_that_ends_turns_with_ordinary_text(self, tokenizer):
        tokenizer.chat_template = NO_END_TEMPLATE
        assert make_renderer(tokenizer).eos_token_ids == {EOS}  # the newline ends nothing

    def test_a_template_for_other_messages(self, tokenizer):
        # It is asked how it ends turns when the renderer is made, where a refusal would stop plain text, too.
        for refusal in ("{{ raise_exception('Tools are needed') }}", "{{ 1 + 'a' }}"):
            tokenizer.chat_template = refusal
            (row,) = make_renderer(tokenizer).render(["The capital is"], [" Paris."])
            assert row.completion_ids == [*encode(tokenizer, " Paris."), EOS]

    def test_a_tokenizer_without_eos(self, tokenizer):
        tokenizer.eos_token = None
        # The model's own, from its generation config; without any, a completion just stops.
        (row,) = make_renderer(tokenizer, eos_token_ids=[5]).render(["The capital is"], [" Paris."])
        assert row.completion_ids == [*encode(tokenizer, " Paris."), 5] and row.finished
        (row,) = make_renderer(tokenizer, eos_token_ids=[]).render(["The capital is"], [" Paris."])
        assert row.completion_ids == encode(tokenizer, " Paris.") and not row.finished


class TestCompletionIds:
    """What the policy generated is scored as it was generated."""

    @pytest.mark.parametrize("kind", ["plain", "messages"])
    def test_used_as_they_are(self, tokenizer, kind, warnings_logged):
        ids = [*letter_by_letter(tokenizer, "Paris."), EOS]
        assert ids != [*encode(tokenizer, "Paris."), EOS]  # else this test shows nothing
        prompt: Any = USER if kind == "messages" else "Capital?"
        (row,) = make_renderer(tokenizer).render([prompt], [PARIS if kind == "messages" else "Paris."], [ids])
        assert row.completion_ids == ids
        assert row.finished
        assert not warnings_logged.records

    def test_cut_off_inside_a_character(self, tokenizer, warnings_logged):
        ids = encode(tokenizer, "Hi 😀")[:-1]  # three of four bytes
        text = tokenizer.decode(ids)
        assert text == "Hi \ufffd"
        (row,) = make_renderer(tokenizer).render([USER], [text], [ids])
        assert row.completion_ids == ids
        assert not warnings_logged.records

    def test_any_of_several_ends_finishes(self, tokenizer):
        other_end = tokenizer.convert_tokens_to_ids("<|im_start|>")
        ids = [*encode(tokenizer, "Paris."), other_end]
        (row,) = make_renderer(tokenizer, eos_token_ids=[EOS, other_end]).render([USER], ["Paris."], [ids])
        assert row.finished
        (row,) = make_renderer(tokenizer).render([USER], ["Paris."], [ids])
        assert not row.finished

    @pytest.mark.parametrize(
        ("completion", "written", "padding", "finished"),
        [
            ("Par", ["Par"], [], False),
            ("", [], [], False),
            ("", ["<|im_end|>"], [], True),
            ("Paris.", ["Paris.", "<|im_end|>"], [EOS] * 4, True),
            ("Paris.", ["Paris.", "<|im_end|>"], [0] * 4, True),
            ("aaaa", [*"aaaa"], [], False),  # repetition is not padding
            ("Paris.<|im_end|>", [*"Paris.", "<|im_end|>"], [], True),
        ],
        ids=["cut off", "nothing", "only the end", "pad is eos", "pad is not eos", "repetition", "end in the text"],
    )
    def test_ends_and_padding(self, tokenizer, completion, written, padding, finished, warnings_logged):
        ids = encode(tokenizer, *written)
        (row,) = make_renderer(tokenizer).render([USER], [completion], [ids + padding])
        assert (row.completion_ids, row.action_positions) == (ids, list(range(len(ids))))
        assert row.finished == finished
        assert not warnings_logged.records

    @pytest.mark.parametrize(
        ("message", "generated"),
        [
            ({"content": "Paris."}, "Hm.\n</think>\n\nParis."),
            ({"content": "Paris.", "reasoning_content": "Hm."}, "<think>Hm.</think>Paris."),
            (
                {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
                "<tool_call>f()</tool_call>",
            ),
            ({"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, "<tool_call>f()</tool_call>"),
        ],
        ids=["reasoning dropped", "reasoning kept apart", "tool call", "tool call without content"],
    )
    def test_parsed_messages(self, tokenizer, message, generated, warnings_logged):
        # TRL parses reasoning and tool calls out of the content, so that the content is only a part of what was
        # written. Without content, only ids that this tokenizer would write itself are known to be its own.
        write = letter_by_letter if message.get("content") else encode
        ids = [*write(tokenizer, generated), EOS]
        (row,) = make_renderer(tokenizer).render([USER], [[{"role": "assistant", **message}]], [ids])
        assert row.completion_ids == ids
        assert not warnings_logged.records

    @pytest.mark.parametrize(
        ("prompt", "completion"), [(USER, "Paris."), (USER, PARIS), ("Capital?", "Paris.")], ids=str
    )
    @pytest.mark.parametrize(
        "foreign", [[40, 41, 42], [5000, 7], []], ids=["in range", "out of range", "only padding"]
    )
    def test_of_another_tokenizer_are_replaced_with_one_warning(
        self, tokenizer, prompt, completion, foreign, warnings_logged
    ):
        renderer = make_renderer(tokenizer)
        rows = renderer.render([prompt] * 2, [completion] * 2, [foreign] * 2)
        renderer.render([prompt], [completion], [foreign])
        assert [row.completion_ids for row in rows] == [[*encode(tokenizer, "Paris."), EOS]] * 2
        assert all(row.finished for row in rows)
        (record,) = warnings_logged.records
        assert "different tokenizers" in record.getMessage()

    @pytest.mark.parametrize("completion", ["", [{"role": "assistant", "content": ""}]], ids=["string", "messages"])
    def test_of_another_tokenizer_for_an_empty_completion(self, tokenizer, completion):
        # The other tokenizer's EOS is some word of ours, and every text contains the empty string.
        word = encode(tokenizer, "P")
        (row,) = make_renderer(tokenizer).render([USER], [completion], [word])
        assert row.completion_ids == [EOS]

    @pytest.mark.parametrize("content", ["", None])
    def test_of_another_tokenizer_for_a_message_without_content(self, tokenizer, content, warnings_logged):
        # A tool call, which has been parsed out of the content: every text contains all of no contents.
        tokenizer.chat_template = str(tokenizer.chat_template).replace(
            "message['content']", "(message['content'] or 'f()')"
        )
        call = {"role": "assistant", "content": content, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
        foreign = letter_by_letter(tokenizer, "capital")
        assert foreign != encode(tokenizer, "capital")  # else this test shows nothing
        prompt = [{"role": "user", "content": "Call f."}]
        (row,) = make_renderer(tokenizer).render([prompt], [[call]], [foreign])
        assert row.completion_ids == [*encode(tokenizer, "f()"), EOS]
        (record,) = warnings_logged.records
        assert "different tokenizers" in record.getMessage()

    def test_of_another_tokenizer_that_happen_to_contain_a_short_completion(self, tokenizer):
        (row,) = make_renderer(tokenizer).render(["2+2="], ["4"], [encode(tokenizer, "x4y")])
        assert row.completion_ids == [*encode(tokenizer, "4"), EOS]

    def test_of_another_tokenizer_with_words_that_the_model_lacks(self, tokenizer):
        # Decoding passes over ids that it does not know, so that the text alone does not tell.
        ids = [*encode(tokenizer, "Paris."), 5000]
        assert tokenizer.decode(ids) == "Paris."
        (row,) = make_renderer(tokenizer).render([USER], [PARIS], [ids])
        assert row.completion_ids == [*encode(tokenizer, "Paris."), EOS]

    def test_negative(self, tokenizer):
        with pytest.raises(ValueError, match="`completion_ids` of row 1 .* they contain -100.*without padding"):
            make_renderer(tokenizer).render([USER] * 2, ["a", "b"], [[66], [67, -100]])


class TestSeveralTurns:
    COMPLETION = [
        {"role": "assistant", "content": "Let me see."},
        {"role": "tool", "name": "search", "content": "Paris 😀"},
        {"role": "assistant", "content": "It is Paris."},
    ]
    WRITTEN_FIRST, FROM_TOOL, WRITTEN_LAST = (
        "Let me see.<|im_end|>",
        "\n<|im_start|>tool\nParis 😀<|im_end|>\n<|im_start|>assistant\n",
        "It is Paris.<|im_end|>",
    )

    def check(self, row, first, tool, last):
        assert row.completion_ids == first + tool + last
        start = len(first) + len(tool)
        assert row.action_positions == [*range(len(first)), *range(start, start + len(last))]

    def test_only_the_assistant_is_scored(self, tokenizer):
        (row,) = make_renderer(tokenizer).render([USER], [self.COMPLETION])
        pieces = (self.WRITTEN_FIRST, self.FROM_TOOL, self.WRITTEN_LAST)
        self.check(row, *(encode(tokenizer, piece) for piece in pieces))
        assert row.finished

    def test_with_ids(self, tokenizer, warnings_logged):
        # The policy's own words in another tokenization, the tool's as the trainer puts them in.
        first = [*letter_by_letter(tokenizer, "Let me see."), EOS]
        tool = encode(tokenizer, self.FROM_TOOL)
        last = [*letter_by_letter(tokenizer, "It is Paris."), EOS]
        (row,) = make_renderer(tokenizer).render([USER], [self.COMPLETION], [first + tool + last])
        self.check(row, first, tool, last)
        assert row.finished
        assert not warnings_logged.records

    def test_with_ids_cut_off(self, tokenizer):
        first, tool = [*letter_by_letter(tokenizer, "Let me see."), EOS], encode(tokenizer, self.FROM_TOOL)
        last = letter_by_letter(tokenizer, "It is")
        completion = [*self.COMPLETION[:2], {"role": "assistant", "content": "It is"}]
        (row,) = make_renderer(tokenizer).render([USER], [completion], [first + tool + last])
        self.check(row, first, tool, last)
        assert not row.finished

    def test_two_calls(self, tokenizer):
        completion = [*self.COMPLETION[:2], *self.COMPLETION]
        (row,) = make_renderer(tokenizer).render([USER], [completion])
        scored = [row.completion_ids[position] for position in row.action_positions]
        assert tokenizer.decode(scored) == 2 * self.WRITTEN_FIRST + self.WRITTEN_LAST
        assert tokenizer.decode(row.completion_ids) == 2 * (self.WRITTEN_FIRST + self.FROM_TOOL) + self.WRITTEN_LAST

    @pytest.mark.parametrize(
        "after",
        [
            "\n<|im_start|>tool\nParis 😀<|im_end|>\n<|im_start|>assistant\n",
            "\n<|im_start|>tool\nParis 😀<|im_end|>\n",
        ],
        ids=["next turn opened", "next turn not opened"],
    )
    def test_with_ids_cut_off_after_a_tool_result(self, tokenizer, after, warnings_logged):
        first, tool = [*letter_by_letter(tokenizer, "Let me see."), EOS], encode(tokenizer, after)
        (row,) = make_renderer(tokenizer).render([USER], [self.COMPLETION[:2]], [first + tool])
        self.check(row, first, tool, [])
        assert not row.finished
        # And after a whole round.
        whole = encode(tokenizer, self.WRITTEN_FIRST, self.FROM_TOOL) + first + tool
        (row,) = make_renderer(tokenizer).render([USER], [[*self.COMPLETION[:2], *self.COMPLETION[:2]]], [whole])
        scored = [row.completion_ids[position] for position in row.action_positions]
        assert tokenizer.decode(scored) == 2 * self.WRITTEN_FIRST
        assert not row.finished
        assert not warnings_logged.records

    def test_a_tool_result_at_the_end_of_text(self, tokenizer):
        (row,) = make_renderer(tokenizer).render([USER], [self.COMPLETION[:2]])
        self.check(row, encode(tokenizer, self.WRITTEN_FIRST), [], [])
        assert row.finished

    @pytest.mark.parametrize("cut_off", [False, True], ids=["finished", "cut off"])
    def test_a_tool_result_that_is_not_in_the_ids(self, tokenizer, cut_off, warnings_logged):
        # The policy's template writes tool results otherwise.
        ids = encode(tokenizer, "Let me see.<|im_end|>", "\n[Paris 😀]\n", "It is Paris.")
        renderer = make_renderer(tokenizer)
        for _ in range(2):
            (row,) = renderer.render([USER], [self.COMPLETION], [ids if cut_off else [*ids, EOS]])
            last = encode(tokenizer, "It is Paris.") if cut_off else encode(tokenizer, self.WRITTEN_LAST)
            self.check(row, encode(tokenizer, self.WRITTEN_FIRST), encode(tokenizer, self.FROM_TOOL), last)
            assert row.finished is not cut_off
        (record,) = warnings_logged.records
        assert "tool results" in record.getMessage() and "`processing_class`" in record.getMessage()

    def test_a_last_tool_result_that_is_not_in_the_ids(self, tokenizer):
        ids = encode(tokenizer, "Let me see.<|im_end|>", "\n[Paris 😀]<|im_end|>")
        (row,) = make_renderer(tokenizer).render([USER], [self.COMPLETION[:2]], [ids])
        self.check(row, encode(tokenizer, self.WRITTEN_FIRST), encode(tokenizer, self.FROM_TOOL), [])
        assert not row.finished

    def test_a_template_that_rewrites_earlier_turns(self, tokenizer):
        tokenizer.chat_template = THINK_TEMPLATE
        with pytest.raises(ValueError, match="rewrites earlier messages.*prefix-preserving"):
            make_renderer(tokenizer).render([USER], [self.COMPLETION])

    def test_positions_outside(self):
        assert positions_outside([1, 2, 3, 4, 5, 6], [[2, 3], [5]]) == [0, 3, 5]
        assert positions_outside([1, 2, 3], []) == [0, 1, 2]
        assert positions_outside([2, 3, 2, 3], [[2, 3], [2, 3]]) == []
        assert positions_outside([1, 2, 3], [[3], [2]]) is None  # not in this order
        assert positions_outside([1, 2], [[9]]) is None


class TestContextLength:
    def test_error_by_default(self, tokenizer):
        prompt = "abcdefgh" * 4
        num_tokens = len(encode(tokenizer, prompt))
        message = (
            rf"Row 1 has {num_tokens} prompt tokens and 2 completion tokens.*more than the 10 tokens.*truncate_left"
        )
        with pytest.raises(ValueError, match=message):
            make_renderer(tokenizer, max_length=10).render(["Hi", prompt], ["a", "b"])

    def test_truncate_left(self, tokenizer):
        prompt = "0123456789" * 3
        ids = encode(tokenizer, prompt)
        renderer = make_renderer(tokenizer, max_length=10, overlong_prompt="truncate_left")
        (row,) = renderer.render([prompt], ["ab"])
        # The completion, here "a", "b" and EOS, stays whole; the 7 tokens before it are kept.
        assert row.completion_ids == [*encode(tokenizer, "ab"), EOS]
        assert row.prompt_ids == ids[-(10 - len(row.completion_ids)) :]
        assert len(row.prompt_ids) + len(row.completion_ids) == 10

    def test_a_completion_that_leaves_no_room(self, tokenizer):
        renderer = make_renderer(tokenizer, max_length=5, overlong_prompt="truncate_left")
        message = (
            r"Row 0 has 1 prompt token and 11 completion tokens, together more than the 5 tokens.* Shorten the "
            r"completion \(lower `max_completion_length` of the trainer\), or use a frozen model with a longer "
            r"context\."
        )
        with pytest.raises(ValueError, match=message):
            renderer.render(["H"], ["0123456789"])


class TestBadBatches:
    @pytest.mark.parametrize(
        ("prompts", "completions", "error", "message"),
        [
            ([], [], ValueError, "batch is empty.*nothing to score"),
            (["a", "b"], ["c"], ValueError, "`completions` has 1 entries for 2 prompts.*repeat a prompt"),
            ("ab", ["c"], TypeError, "must be lists.*a string was given"),
            (["a"], "c", TypeError, "must be lists.*a string was given"),
            (["a", 3], ["c", "d"], TypeError, "prompt of row 1 is int 3.*string or a list of messages"),
            (["a", "b"], ["c", None], TypeError, "completion of row 1 is NoneType None.*string or a list of messages"),
            (["a", "b"], ["c", 2.5], TypeError, "completion of row 1 is float 2.5"),
            ([USER], [["Paris."]], TypeError, r"completion of row 0 is list \['Paris.'\]"),
            ([USER], [[{"content": "Paris."}]], TypeError, "completion of row 0 is list"),
            ([{"role": "user", "content": "Hi"}], ["Paris."], TypeError, "prompt of row 0 is dict"),
            (["a"], [PARIS], TypeError, "prompt of row 0 is a string, but its completion is a list.*one kind"),
            ([[]], ["a"], ValueError, "prompt of row 0 is an empty list of messages"),
        ],
    )
    def test_is_refused(self, tokenizer, prompts, completions, error, message):
        with pytest.raises(error, match=message):
            make_renderer(tokenizer).render(prompts, completions)

    def test_ids_for_some_rows_only(self, tokenizer):
        with pytest.raises(ValueError, match="`completion_ids` has 1 entries for 2 prompts"):
            make_renderer(tokenizer).render(["a", "b"], ["c", "d"], [[66]])

    def test_messages_without_a_template(self, tokenizer):
        tokenizer.chat_template = None
        with pytest.raises(
            ValueError, match=r"tiny-llama.*has no chat template.*`processing_class`.*clone_chat_template"
        ):
            make_renderer(tokenizer).render([USER], [PARIS])
        assert len(make_renderer(tokenizer).render(["Hi"], ["you"])) == 1  # plain text needs none

    def test_a_long_value_is_shown_shortened(self, tokenizer):
        with pytest.raises(TypeError) as caught:
            make_renderer(tokenizer).render(["a"], [b"x" * 1000])
        assert "bytes b'xxx" in str(caught.value) and len(str(caught.value)) < 250


def assert_spans_tile(text, offsets, num_tokens):
    assert len(offsets) == num_tokens
    end = 0
    for start, stop in offsets:
        assert start == end <= stop
        end = stop
    assert end == len(text)


class TestDecodeWithOffsets:
    def test_by_hand(self, shared_tokenizer):
        # An emoji is four bytes, each a token of this tokenizer; the last one writes the character.
        ids = [*encode(shared_tokenizer, "a", "😀", "b"), EOS]
        text, offsets = decode_with_offsets(shared_tokenizer, ids)
        assert text == "a😀b<|im_end|>"
        assert offsets == [(0, 1), (1, 1), (1, 1), (1, 1), (1, 2), (2, 3), (3, 13)]

    @settings(max_examples=150, deadline=None)
    @given(st.text(max_size=30))
    @example("")
    @example("naïve 中文字符 мир")
    @example("مرحبا بالعالم")  # right to left
    @example("👩‍👩‍👧‍👦🇫🇷e\u0301")  # joined emoji, flag, combining accent
    @example("a\ufffdb\ufffd")  # a replacement character that is meant
    @example("<|im_start|>user\n<|im_end|>")
    @example("  two  spaces , and ' quotes 's")
    def test_text_comes_back_and_the_spans_tile_it(self, shared_tokenizer, original):
        ids = encode(shared_tokenizer, original)
        text, offsets = decode_with_offsets(shared_tokenizer, ids)
        assert text == original
        assert_spans_tile(text, offsets, len(ids))

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.integers(0, 307), max_size=30))
    def test_any_ids(self, shared_tokenizer, ids):
        # What a policy samples at high temperature need not be valid UTF-8.
        text, offsets = decode_with_offsets(shared_tokenizer, ids)
        assert_spans_tile(text, offsets, len(ids))
        if "\ufffd" not in text:
            assert text == shared_tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def test_each_token_gets_its_own_characters(self, shared_tokenizer):
        ids = encode(shared_tokenizer, "The capital of Italy.")
        text, offsets = decode_with_offsets(shared_tokenizer, ids)
        assert [text[start:stop] for start, stop in offsets] == [shared_tokenizer.decode([i]) for i in ids]

    def test_a_tokenizer_that_marks_spaces_before_words(self):
        # SentencePiece style: the decoder drops the first space of a text, so a token's text depends on its place.
        words = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "s": 3, "▁": 4}
        backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        text, offsets = decode_with_offsets(tokenizer, [1, 2, 3, 2])
        assert text == "Hello worlds world"
        assert [text[start:stop] for start, stop in offsets] == ["Hello", " world", "s", " world"]
