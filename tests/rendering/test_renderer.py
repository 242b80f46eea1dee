# SPDX-License-Identifier: Apache-2.0
"""What is scored: every expected sequence is written out by hand and encoded piece by piece."""

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.image_utils import load_image

from endotrl.rendering.ends import positions_outside
from endotrl.rendering.images import load_picture
from endotrl.rendering.messages import add_criterion
from endotrl.rendering.offsets import decode_with_offsets
from endotrl.rendering.renderer import Renderer

from ..support import helpers
from ..support.reference import chatml


EOS, START_ID = 1, 0
END, START = "<|im_end|>", "<|im_start|>"
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
NO_HEADER_TEMPLATE = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
# As Gemma 2's.
NO_SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + NO_END_TEMPLATE
)


@pytest.fixture(scope="module")
def shared_tokenizer(tiny_model_path):
    return AutoTokenizer.from_pretrained(tiny_model_path)


def encode(tokenizer, *pieces):
    """Encodes each piece for itself, so that no token reaches from one into the next. Ids stand for themselves."""
    encoded = ([piece] if isinstance(piece, int) else helpers.encode(tokenizer, piece) for piece in pieces)
    return [token_id for ids in encoded for token_id in ids]


def make_renderer(tokenizer, **kwargs):
    return Renderer(tokenizer, **{"eos_token_ids": [EOS], "vocab_size": 308, **kwargs})


class TestPrompts:
    def test_messages(self, tokenizer):
        turns = [*USER, {"role": "assistant", "content": "Rome."}, {"role": "user", "content": "Sure? 😀"}]
        prompts = [USER, [{"role": "system", "content": "Be brief."}, *USER], turns]
        for row, messages in zip(make_renderer(tokenizer).render(prompts, [PARIS] * 3), prompts, strict=True):
            assert tokenizer.decode(row.prompt_ids) == chatml(messages, generation_prompt=True)
            assert row.prompt_ids == encode(tokenizer, chatml(messages, generation_prompt=True))
            assert row.completion_ids == [*encode(tokenizer, "Paris."), EOS]

    def test_plain_text_gets_the_special_tokens_of_the_tokenizer_once(self, tokenizer):
        bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
        )
        text, chat, empty = make_renderer(tokenizer).render(["What is", USER, ""], [" Paris?"] * 3)
        assert text.prompt_ids == [bos, *encode(tokenizer, "What is")]
        assert text.completion_ids == [*encode(tokenizer, " Paris?"), EOS]
        # The template writes its own special tokens: no second BOS.
        assert chat.prompt_ids == encode(tokenizer, chatml(USER, generation_prompt=True))
        assert empty.prompt_ids == [bos]  # a context

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


POET = {"type": "text", "text": "You are a poet."}


class TestCriterion:
    def test_one_per_row(self, tokenizer):
        poet = [{"role": "system", "content": "You are a poet."}, *USER]
        prompts, criteria = [USER, USER, poet, "2+2="], ["Be exact.", None, "Be brief.", "Be exact."]
        rows = make_renderer(tokenizer).render(prompts, [PARIS, PARIS, PARIS, "4"], criteria=criteria)
        plain = chatml(USER, generation_prompt=True)
        assert [tokenizer.decode(row.prompt_ids) for row in rows] == [
            f"<|im_start|>system\nBe exact.<|im_end|>\n{plain}",
            plain,
            f"<|im_start|>system\nBe brief.\n\nYou are a poet.<|im_end|>\n{plain}",
            "Be exact.\n\n2+2=",
        ]
        assert rows[0].completion_ids == [*encode(tokenizer, "Paris."), EOS]
        assert poet[0]["content"] == "You are a poet."  # the dataset's own message stays

    @pytest.mark.parametrize(
        ("system", "content"),
        [
            *((system, "Be exact.") for system in ({}, {"content": None}, {"content": ""})),
            ({"content": (POET,)}, [{"type": "text", "text": "Be exact.\n\n"}, POET]),
        ],
        ids=["missing", "none", "empty", "parts"],
    )
    def test_joins_a_system_message(self, system, content):
        joined = add_criterion([{"role": "system", **system}, *USER], "Be exact.")
        assert joined == [{"role": "system", "content": content}, *USER]

    def test_a_template_without_a_system_role(self, tokenizer):
        tokenizer.chat_template = NO_SYSTEM_TEMPLATE
        renderer = make_renderer(tokenizer)
        refusal = r"chat template of '.*tiny-llama' rejects these messages: System role not supported\."
        with pytest.raises(ValueError, match=refusal + ".*criterion.*first user message"):
            renderer.render([USER], [PARIS], criteria=["Be exact."])
        with pytest.raises(ValueError, match=refusal + "$"):
            renderer.render([[{"role": "system", "content": "Be brief."}, *USER]], [PARIS])
        assert renderer.render([USER], [PARIS])[0].finished  # without a system message, nothing is wrong


# An empty block before the answer, and a space before the end: as Qwen3 and Llama 2 write finished turns.
FILLED_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ (m['content'] | string).strip() + ' <|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CALL_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ (m['content'] or 'f()') + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
TURNS = [
    {"role": "assistant", "content": "Let me see."},
    {"role": "tool", "name": "search", "content": "Paris 😀"},
    {"role": "assistant", "content": "It is Paris."},
]


class Read(str):
    """A piece that is read, but not written by the policy."""


TOOL = Read("\n<|im_start|>tool\nParis 😀<|im_end|>\n<|im_start|>assistant\n")
TOOL_LAST = Read("\n<|im_start|>tool\nParis 😀<|im_end|>\n")  # the next turn is not opened
FIRST, LAST = ("Let me see.", END), ("It is Paris.", END)
# Not how the tokenizer would write them, but a policy may sample it.
FIRST_SAMPLED, LAST_SAMPLED = (*"Let me see.", END), (*"It is Paris.", END)


def without_eos(tokenizer):
    tokenizer.eos_token = None


def with_another_eos(tokenizer):
    """As Qwen's base models: the template ends a turn with <|im_end|>, the tokenizer's EOS is another token."""
    tokenizer.eos_token = START
    tokenizer.add_special_tokens({"additional_special_tokens": [END]})


@dataclass
class Case:
    """A prompt and completion, ids of the policy in pieces, and the pieces that are scored; by default, those ids."""

    prompt: Any
    completion: Any
    writes: tuple[str | int, ...] | None = None
    ids: tuple[str | int, ...] | None = None
    finished: bool = True
    warning: str | None = None
    template: str | None = None
    change: Callable[[Any], None] = lambda tokenizer: None
    settings: dict[str, Any] = field(default_factory=dict)


def assistant(**message):
    return [{"role": "assistant", **message}]


BASE: dict[str, Any] = {"change": with_another_eos, "settings": {"eos_token_ids": [START_ID]}}
FOREIGN: dict[str, Any] = {"writes": ("Paris.", END), "warning": "different tokenizers"}
OTHER_RESULT = {"warning": "tool results", "writes": (*FIRST, TOOL, *LAST)}
CASES = {
    # A completion that is given as text is a complete answer, so its end is scored too. What the template writes after
    # the end of the turn, a line break, is not an action.
    "text": Case(USER, "Paris.", ("Paris.", END)),
    "message": Case(USER, PARIS, ("Paris.", END)),
    "plain text": Case("The capital is", " Paris.", (" Paris.", END)),
    "an end that is there is not doubled": Case("The capital is", " Paris.<|im_end|>", (" Paris.", END)),
    "an end inside": Case("The capital is", " Rome.<|im_end|> Paris.", (" Rome.", END, " Paris.", END)),
    "nothing, plain": Case("The capital is", "", (END,)),
    "nothing, message": Case(USER, "", (END,)),
    "white space at the borders": Case(USER, "\n\n Paris. ", ("\n\n Paris. ", END)),
    # The template's newline stops nothing, EOS does.
    "a template that does not end turns": Case(USER, PARIS, ("Paris.", END), template=NO_END_TEMPLATE),
    "a finished turn is filled": Case(
        USER, PARIS, ("Paris.", END), template=FILLED_TEMPLATE, warning="'<think></think>'.*enable_thinking=False"
    ),
    "a finished turn of parts is filled": Case(
        USER, assistant(content=[{"type": "text", "text": text} for text in ("Pa", "ris.")]), ("Paris.", END),
        template=FILLED_TEMPLATE, warning="'<think></think>'.*enable_thinking=False",
    ),
    # A template is asked how it ends turns when the renderer is made, where a refusal would stop plain text, too.
    "a template that refuses": Case(
        "The capital is", " Paris.", (" Paris.", END), template="{{ raise_exception('Tools are needed') }}"
    ),
    "a template that fails": Case("The capital is", " Paris.", (" Paris.", END), template="{{ 1 + 'a' }}"),
    # The model's own end, from its generation config; without any, a completion just stops.
    "a tokenizer without EOS": Case("It is", " 4", (" 4", 5), change=without_eos, settings={"eos_token_ids": [5]}),
    "no end at all": Case("It is", " 4", (" 4",), finished=False, change=without_eos, settings={"eos_token_ids": []}),
    # Generation goes on behind the end of a turn, up to an EOS, which may also pad what follows. Plain text has none.
    "base model, text": Case(USER, PARIS, ("Paris.", END), **BASE),
    "base model, ids": Case(USER, PARIS, ids=("Paris.", END), **BASE),
    "base model, EOS": Case(USER, PARIS, ids=("Paris.", END, START), **BASE),
    "base model, padded": Case(USER, PARIS, ("Paris.", END, START), ids=("Paris.", END, *[START] * 4), **BASE),
    "base model, plain": Case("The capital is", " Paris.", (" Paris.", START), **BASE),
    "base model, reasoning": Case(
        USER, "Hm.</think>Paris.", ("Hm.</think>Paris.", END), template=THINK_TEMPLATE, **BASE
    ),
    # The end behind what the template adds to an answer; and what stands before an end that is no special token.
    "an end behind a space": Case(
        USER, "Paris.", ("Paris.", END), template=FILLED_TEMPLATE, warning="<think>", change=with_another_eos,
        settings={"eos_token_ids": [EOS, START_ID]},
    ),
    "a word that is the end": Case(
        USER, "Paris", ("Paris", START, "!"), template=NO_END_TEMPLATE.replace("'\n'", f"'{START}!'"),
        settings={"eos_token_ids": [2]},  # of "!"
    ),
    "text before the end": Case(
        USER, "Paris", ("Paris", START), template=NO_END_TEMPLATE.replace("'\n'", f"'{START} {END}'")
    ),
    # What the policy generated is scored as it was generated.
    "ids, plain": Case("Capital?", "Paris.", ids=(*"Paris.", END)),
    "ids, message": Case(USER, PARIS, ids=(*"Paris.", END)),
    "ids, cut off": Case(USER, "Par", ids=("Par",), finished=False),
    "ids, nothing": Case(USER, "", ids=(), finished=False),
    "ids, only the end": Case(USER, "", ids=(END,)),
    "ids, pad is eos": Case(USER, "Paris.", ("Paris.", END), ids=("Paris.", *[END] * 5)),
    "ids, pad is not eos": Case(USER, "Paris.", ("Paris.", END), ids=("Paris.", END, *[0] * 4)),
    "ids, repetition is not padding": Case(USER, "aaaa", ids=(*"aaaa",), finished=False),
    "ids, end in the text": Case(USER, "Paris.<|im_end|>", ids=(*"Paris.", END)),
    "ids, the second of two ends": Case(
        USER, "Paris.", ids=("Paris.", START), settings={"eos_token_ids": [EOS, START_ID]}
    ),
    "ids, no end": Case(USER, "Paris.", ids=("Paris.", START), finished=False),
    # TRL parses reasoning and tool calls out of the content, so that the content is only a part of what was written.
    # Without content, only ids that this tokenizer would write itself are known to be its own.
    "reasoning dropped": Case(USER, PARIS, ids=(*"Hm.\n</think>\n\nParis.", END)),
    "reasoning kept apart": Case(
        USER, assistant(content="Paris.", reasoning_content="Hm."), ids=(*"<think>Hm.</think>Paris.", END)
    ),
    "tool call": Case(USER, assistant(content="", **CALL), ids=("<tool_call>f()</tool_call>", END)),
    "tool call without content": Case(USER, assistant(**CALL), ids=("<tool_call>f()</tool_call>", END)),
    # Of another tokenizer: the text is encoded.
    **{
        f"foreign ids {ids}, {kind}": Case(prompt, completion, ids=ids, **FOREIGN)
        for ids in ((40, 41, 42), (5000, 7), ())
        for kind, prompt, completion in (("text", USER, "Paris."), ("message", USER, PARIS), ("plain", "?", "Paris."))
    },
    # The other one's EOS is some word of ours, and every text contains the empty string.
    "foreign ids of nothing": Case(USER, "", (END,), ids=("P",), warning="different tokenizers"),
    "foreign ids of no content": Case(USER, assistant(content=""), (END,), ids=("P",), warning="different tokenizers"),
    # A call was parsed out of the content: every text contains all of no contents.
    **{
        f"foreign ids of a call, content {content!r}": Case(
            USER, assistant(content=content, **CALL), ("f()", END), ids=(*"capital",), template=CALL_TEMPLATE,
            warning="different tokenizers",
        )
        for content in ("", None)
    },
    "foreign ids that contain a short answer": Case("2+2=", "4", ("4", END), ids=("x4y",), warning="different"),
    # Decoding passes over ids that it does not know, so that the text alone does not tell.
    "foreign ids with unknown words": Case(USER, PARIS, ids=("Paris.", 5000), **FOREIGN),
    # Several turns: only the assistant is scored.
    "turns": Case(USER, TURNS, (*FIRST, TOOL, *LAST)),
    "base model, a result that ends as a turn does": Case(
        USER, TURNS, (*FIRST, Read(f"Paris 😀{END}"), *LAST), template=NO_HEADER_TEMPLATE, **BASE
    ),
    "two calls": Case(USER, [*TURNS[:2], *TURNS], (*FIRST, TOOL, *FIRST, TOOL, *LAST)),
    "a result at the end": Case(USER, TURNS[:2], FIRST),
    "turns, ids": Case(USER, TURNS, ids=(*FIRST_SAMPLED, TOOL, *LAST_SAMPLED)),
    "turns, ids cut off": Case(
        USER, [*TURNS[:2], *assistant(content="It is")], ids=(*FIRST_SAMPLED, TOOL, *"It is"), finished=False
    ),
    **{
        f"turns, ids cut off behind {len(rounds)} results, {tool!r}": Case(
            USER, TURNS[:2] * len(rounds), ids=tuple(piece for first, after in rounds for piece in (*first, after)),
            finished=False,
        )
        for tool in (TOOL, TOOL_LAST)
        for rounds in ([(FIRST_SAMPLED, tool)], [(FIRST, TOOL), (FIRST_SAMPLED, tool)])
    },
    # The policy's template writes results otherwise.
    "another result in the ids": Case(USER, TURNS, ids=(*FIRST, "\n[Paris 😀]\n", *LAST), **OTHER_RESULT),
    "another result in the ids, cut off": Case(
        USER, TURNS, (*FIRST, TOOL, "It is Paris."), ids=(*FIRST, "\n[Paris 😀]\n", "It is Paris."), finished=False,
        warning="tool results.*`processing_class`",
    ),
    "another last result in the ids": Case(
        USER, TURNS[:2], (*FIRST, TOOL), ids=(*FIRST, "\n[Paris 😀]", END), finished=False, warning="tool results",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_scored(case, tokenizer, warnings_logged):
    case.change(tokenizer)
    tokenizer.chat_template = case.template or tokenizer.chat_template
    renderer = make_renderer(tokenizer, **case.settings)
    given = None if case.ids is None else [encode(tokenizer, *case.ids)]
    written, actions = [], []
    for piece in case.ids if case.writes is None else case.writes:
        ids = encode(tokenizer, piece)
        actions += [] if isinstance(piece, Read) else range(len(written), len(written) + len(ids))
        written += ids
    for _ in range(2):  # and a warning is given once
        (row,) = renderer.render([case.prompt], [case.completion], given)
        assert (row.completion_ids, row.action_positions, row.finished) == (written, actions, case.finished)
    said = warnings_logged()
    assert len(said) == (case.warning is not None), said
    assert not said or re.search(case.warning, said[0])


def test_ids_cut_off_inside_a_character(tokenizer, warnings_logged):
    ids = encode(tokenizer, "Hi 😀")[:-1]  # three of four bytes
    text = tokenizer.decode(ids)
    assert text == "Hi \ufffd"
    (row,) = make_renderer(tokenizer).render([USER], [text], [ids])
    assert row.completion_ids == ids
    assert not warnings_logged()


def test_positions_outside():
    assert positions_outside([1, 2, 3, 4, 5, 6], [[2, 3], [5]]) == [0, 3, 5]
    assert positions_outside([2, 3, 2, 3], [[2, 3], [2, 3]]) == []
    assert positions_outside([1, 2, 3], [[3], [2]]) is None  # not in this order


def test_context_length(tokenizer):
    prompt = "0123456789" * 3  # a token per character, as all below
    with pytest.raises(ValueError, match="Row 1 has 30 prompt tokens and 2 .* the 10 tokens.*truncate_left"):
        make_renderer(tokenizer, max_length=10).render(["Hi", prompt], ["a", "b"])
    renderer = make_renderer(tokenizer, max_length=10, overlong_prompt="truncate_left")
    (row,) = renderer.render([prompt], ["ab"])
    assert row.completion_ids == [*encode(tokenizer, "ab"), EOS]  # whole
    assert row.prompt_ids == encode(tokenizer, "3456789") and row.cut
    with pytest.raises(ValueError, match="1 prompt token and 11 completion tokens.*lower `max_completion_length`"):
        renderer.render(["H"], ["0123456789"])


THOUGHTFUL = assistant(content="Paris.", reasoning_content="Hm.")


class TestBadBatches:
    @pytest.mark.parametrize(
        ("batch", "error", "message"),
        [
            (([], []), ValueError, "batch is empty.*nothing to score"),
            ((["a", "b"], ["c"]), ValueError, "`completions` has 1 entries for 2 prompts.*repeat a prompt"),
            (([USER] * 2, ["a", "b"], [[66]]), ValueError, "`completion_ids` has 1 entries for 2 prompts"),
            (([USER], ["a"], [[67, -100]]), ValueError, "`completion_ids` of row 0 .* without padding, got -100"),
            (("ab", ["c"]), TypeError, "must be lists.*got a string"),
            ((["a"], "c"), TypeError, "must be lists.*got a string"),
            ((["a", 3], ["c", "d"]), TypeError, "prompt of row 1 must be a string or a list of messages.* got int 3"),
            ((["a", "b"], ["c", None]), TypeError, "completion of row 1 must be a string or a list .* got NoneType"),
            ((["a", "b"], ["c", 2.5]), TypeError, "completion of row 1 must be .* got float 2.5"),
            ((["a"], [b"x" * 1000]), TypeError, "completion of row 0 must be .* got bytes b'x{,60}\\.$"),  # shortened
            (([USER], [["Paris."]]), TypeError, r"completion of row 0 must be .* got list \['Paris.'\]"),
            (([USER], [[{"content": "Paris."}]]), TypeError, "completion of row 0 must be .* got list"),
            (([{"role": "user", "content": "Hi"}], ["Paris."]), TypeError, "prompt of row 0 must be .* got dict"),
            (
                (["a"], [PARIS]),
                TypeError,
                "prompt of row 0 is a string, but its completion is a list.*both as strings",
            ),
            (([[]], ["a"]), ValueError, "prompt of row 0 is an empty list of messages"),
            ((["Hi", ""], ["a", "b"]), ValueError, "prompt of row 1 is empty.*no BOS.*Pass a prompt"),
            (([USER], [THOUGHTFUL]), ValueError, "leaves out the reasoning"),
        ],
    )
    def test_is_refused(self, tokenizer, batch, error, message):
        with pytest.raises(error, match=message):
            make_renderer(tokenizer).render(*batch)

    @pytest.mark.parametrize(
        ("template", "completion", "message"),
        [
            # What the policy wrote is in the template's words, and these stand in another turn than the one that it
            # continued.
            (THINK_TEMPLATE, THOUGHTFUL, r"\['content', 'reasoning_content', 'role'\].*Pass `completion_ids`"),
            (THINK_TEMPLATE, TURNS, "rewrites earlier messages.*prefix-preserving"),
            (None, PARIS, r"tiny-llama.*has no chat template.*`processing_class`.*clone_chat_template"),
        ],
    )
    def test_messages_that_a_template_cannot_write(self, tokenizer, template, completion, message):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=message):
            make_renderer(tokenizer).render([USER], [completion])
        assert len(make_renderer(tokenizer).render(["Hi"], ["you"])) == 1  # plain text needs none


def assert_spans_tile(text, offsets, num_tokens):
    assert len(offsets) == num_tokens
    end = 0
    for start, stop in offsets:
        assert start == end <= stop
        end = stop
    assert end == len(text)


def test_image_files_are_turned_upright(tmp_path):
    path, picture, exif = str(tmp_path / "red.png"), Image.new("RGB", (2, 1)), Image.Exif()
    picture.putpixel((0, 0), (255, 0, 0))
    exif[ExifTags.Base.Orientation] = 6  # to be shown turned to the right
    picture.save(path, exif=exif)
    loaded = load_picture(0, path)
    assert loaded.size == (1, 2) and loaded.getpixel((0, 0)) == (255, 0, 0)
    assert loaded.tobytes() == load_image(path).tobytes()  # which reads them for a policy


def test_transparency_is_dropped_where_transformers_drops_it(tmp_path):
    path, picture = str(tmp_path / "red.png"), Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    picture.save(path)
    raw = Path(path).read_bytes()
    encoded = base64.b64encode(raw).decode()
    for text in (path, encoded, f"data:image/png;base64,{encoded}"):
        assert load_picture(0, text).tobytes() == load_image(text).tobytes() == b"\xff\0\0"
    # Images of a dataset, decoded or not, keep it: the processor puts white behind them.
    for form in (picture, raw, {"bytes": raw, "path": None}, {"bytes": encoded}, {"bytes": None, "path": path}):
        assert load_picture(0, form).tobytes() == picture.tobytes()


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
