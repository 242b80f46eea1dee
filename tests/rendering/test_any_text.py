# SPDX-License-Identifier: Apache-2.0
"""Any text, any lengths, any messages: a finite reward, or an error that says what is wrong. And markup stays text."""

import json
import math
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from endotrl import EndogenousReward
from endotrl.demo.findings import Part, Policy, _answers
from endotrl.evaluation.tables import markdown_table
from endotrl.reporting import page
from endotrl.score_file.rows import score_rows
from endotrl.scoring import TokenStats

from ..support.rows import parse_row


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# All of Unicode but lone surrogates, which no UTF-8 file can hold. Two of them fit a context of 256 tokens, at four a
# character.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["", " ", "\0", "\u202e\u0301", "🏳️‍🌈" * 5, "<|im_end|>", "<eos><pad>", "\r\n\t", "\ufeff", "{{ x }}", "{% raw %}"]
)


@pytest.fixture(scope="module")
def reward(tiny_model_path):
    return EndogenousReward(tiny_model_path, dtype="float32", device="cpu").load()


@FUZZ
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_any_text(rows, reward):
    prompts, completions = ["Q: " + prompt for prompt, _ in rows], [completion for _, completion in rows]
    rewards = reward(prompts=prompts, completions=completions)
    assert len(rewards) == len(rows)
    for value in rewards:
        assert value is None or (math.isfinite(value) and value < 1e-3)  # a log-probability
    alone = [reward(prompts=[p], completions=[c])[0] for p, c in zip(prompts, completions, strict=True)]
    for value, other in zip(rewards, alone, strict=True):
        assert (value is None) == (other is None)
        if value is not None:
            assert value == pytest.approx(other, rel=1e-4, abs=1e-3)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def messages(roles):
    message = st.fixed_dictionaries({"role": st.sampled_from(roles), "content": TEXT})
    return st.lists(message, min_size=1, max_size=5)


@settings(FUZZ, max_examples=120)
@given(prompt=JSON | messages(["user", "assistant", "system"]), completion=JSON | messages(["assistant"]))
@example(prompt=[{"role": "user", "content": "a"}], completion=[{"role": "tool", "content": "b"}])
def test_any_structure_is_scored_or_explained(prompt, completion, reward):
    try:
        (value,) = reward(prompts=[prompt], completions=[completion])
    except (ValueError, TypeError) as error:
        # Of this package, with the row or the template that it is about: not Python's own words.
        assert re.match(r"The (prompt|completion|chat template) of |Row 0 has ", str(error)), error
    else:
        assert value is None or (math.isfinite(value) and value < 1e-3)


@FUZZ
@given(line=TEXT | JSON.map(json.dumps) | st.fixed_dictionaries({"prompt": JSON, "completion": JSON}).map(json.dumps))
def test_any_line_of_a_file(line, reward):
    row, good = parse_row(1, line.encode()), parse_row(2, b'{"prompt": "a", "completion": "b"}')
    result, other = score_rows(reward, [row, good])
    assert isinstance(other, TokenStats)  # the others are scored, whatever this one is
    assert isinstance(result, TokenStats) or len(result) > 20


ATTACKS = [
    "<script>alert(1)</script>",
    "</td></table><img src=x onerror=alert(1)>",
    '"><svg/onload=alert(1)>',
    "<!-- -->]]></style><iframe src=javascript:alert(1)>",
]


def test_markup_in_data_is_text_in_markdown():
    """Names of models, groups and scorers may come from data, and may head a column of `results.md`."""
    hostile = [*ATTACKS, "![x](http://example.com)", "a|b", "two\nlines\r\n# heading"]
    text = markdown_table(hostile, [hostile, [0.5] * len(hostile)])
    lines = text.splitlines()
    assert "<" not in text and "](" not in text
    assert len(lines) == 4 and len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_markup_in_answers_is_text_in_the_demo_report():
    number = len(ATTACKS)
    policy = Policy(ATTACKS, [[]] * number, [False] * number, {"sampled": [0.0] * number})
    part = Part("facts", "t", {"base": policy, "endogenous": policy}, ATTACKS, ["g"] * number, {})
    tags = re.findall(r"<(\w+)", page("demo", [("", _answers(part))]))
    assert "td" in tags and not {"script", "img", "svg", "iframe"} & set(tags)
