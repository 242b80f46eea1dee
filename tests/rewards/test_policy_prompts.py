# SPDX-License-Identifier: Apache-2.0
"""
A reward scores completions after the prompts that the policy read, in every trainer. What the policy read comes from
the trainer's own tokenization, from its generation, or is written out by hand.
"""

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOTrainer

from endotrl import EndogenousReward, SentenceReward, SentenceRewardModel
from endotrl.rendering.policy import PromptSettings
from endotrl.rendering.renderer import Rendered
from endotrl.rewards import MeanLogProbReward, RoutedReward
from endotrl.score_file import score_file
from endotrl.sentence import SentenceRewardConfig

from ..support import trainers
from ..support.helpers import SMALL, encode
from ..support.reference import completion_log_probs


TEMPLATES = Path(trl.__file__).parent / "chat_templates"
QUESTION = [{"role": "user", "content": "What is 3 times 4?"}]
CONTINUED = [*QUESTION, {"role": "assistant", "content": "It is"}]
PROMPTS = [QUESTION, [{"role": "user", "content": "Capital of Italy?"}]]
TEXTS = ["3 times 4 is", "Italy's"]
NOT_THINKING: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
BOS = "<|im_start|>"


def multiply(a: int, b: int) -> int:
    """
    Multiplies two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


@pytest.fixture(scope="module")
def path(tiny_model_path, tmp_path_factory):
    """Checkpoint with a context for long system prompts, a BOS, and Qwen3's template."""
    folder = str(tmp_path_factory.mktemp("models") / "tiny-qwen3")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path, bos_token=BOS)
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **SMALL,
        max_position_embeddings=8192,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Watched:
    """A reward that records the rows it scores."""

    def __init__(self, reward: Any) -> None:
        self.reward, self.__name__ = reward, reward.__name__
        self.rows: list[list[Rendered]] = []
        score = reward._score_rows
        reward._score_rows = lambda rows, *args, **kwargs: self.rows.append(rows) or score(rows, *args, **kwargs)

    def __call__(self, **kwargs: Any) -> Any:
        return self.reward(**kwargs)

    @property
    def prompt_ids(self) -> list[list[int]]:
        """Of the last batch."""
        return [row.prompt_ids for row in self.rows[-1]]


def make_trainer(
    path: str, reward: Any, folder: Path, kind: type = GRPOTrainer, prompts: Any = PROMPTS, **settings: Any
) -> Any:
    small: dict[str, Any] = {"per_device_train_batch_size": 4, "max_completion_length": 4, "max_steps": 1}
    small["train_dataset"] = Dataset.from_dict({"prompt": prompts * 2})
    small |= {} if kind is OnlineDPOTrainer else {"num_generations": 2}
    return trainers.make_trainer(kind, path, folder, reward, **{**small, **settings})


def ask(trainer: Any, prompts: list[Any], completions: list[Any], ids: list[list[int]], **columns: list[Any]) -> None:
    """Lets a trainer compute the rewards of given completions as if its policy had generated them."""
    inputs = [{"prompt": p, **{k: v[i] for k, v in columns.items()}} for i, p in enumerate(prompts)]
    trainer._calculate_rewards(inputs, prompts, completions, ids)


def answers(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[list[Any], list[list[int]]]:
    ids = [*encode(tokenizer, "12"), tokenizer.eos_token_id]
    return [[{"role": "assistant", "content": "12"}]] * count, [ids] * count


def templated(tokenizer: PreTrainedTokenizerBase, prompt: Any, **kwargs: Any) -> list[int]:
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=False, **kwargs
    )


def with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Begins every text with the BOS."""
    special = [(BOS, tokenizer.convert_tokens_to_ids(BOS))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=special)
    return tokenizer


def assert_reads_as_policy(trainer: Any, reward: Watched) -> None:
    ask(trainer, [QUESTION], *answers(trainer.processing_class, 1))
    assert reward.prompt_ids == trainer._tokenize_prompts([QUESTION])[0]


SCENARIOS: dict[str, dict[str, Any]] = {
    "GRPO, messages": {},
    "GRPO, text": {"prompts": TEXTS},
    "RLOO, messages": {"kind": RLOOTrainer},
    "RLOO, text": {"kind": RLOOTrainer, "prompts": TEXTS},
    "a rival": {"reward": MeanLogProbReward},
    "tools, and the template that TRL swaps in": {"tools": [multiply]},
    "a reward that is given the same": {
        "tools": [multiply],
        "reward": partial(EndogenousReward, chat_template_kwargs={"enable_thinking": False}),
    },
    "an answer behind which another turn is opened": {"prompts": [CONTINUED, QUESTION]},
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_reads_what_the_policy_reads(name, path, tmp_path, warnings_logged):
    """The README's one line: the reward gets no settings."""
    settings: dict[str, Any] = {"reward": EndogenousReward, "prompts": PROMPTS, **SCENARIOS[name]}
    reward, prompts = Watched(settings.pop("reward")(path)), settings["prompts"]
    trainer = make_trainer(path, reward, tmp_path, beta=0.1, shuffle_dataset=False, **NOT_THINKING, **settings)
    if "tools" in settings:  # the random policy cannot call them
        ask(trainer, [prompts[0]] * 2 + [prompts[1]] * 2, *answers(trainer.processing_class, 4))
    else:
        trainer.train()
    read = trainer._tokenize_prompts(prompts)[0]
    assert reward.prompt_ids == [read[0], read[0], read[1], read[1]]
    text = trainer.processing_class.decode(read[0])
    assert text.endswith("<think>\n\n</think>\n\n" if prompts != TEXTS else TEXTS[0])
    assert ("multiply" in text) == ("tools" in settings)
    assert not warnings_logged()


def rollout_of(prompt_ids: list[int] | None, completion_ids: list[int], mask: list[int] | None = None) -> Any:
    """A rollout function that returns the same completion for each prompt, by default the trainer's own prompts."""

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        row: dict[str, Any] = {"completion_ids": completion_ids, "logprobs": [0.0] * len(completion_ids)}
        row |= {} if mask is None else {"env_mask": mask}
        read = trainer._tokenize_prompts(prompts)[0] if prompt_ids is None else [prompt_ids] * len(prompts)
        return {"prompt_ids": read, **{key: [value] * len(prompts) for key, value in row.items()}}

    return rollout


def last_first(reward: Any) -> Any:
    """A reward function that asks another one for single rows, the last one first."""

    def backwards(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[Any]:
        columns = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        rows = [{name: [column[i]] for name, column in columns.items()} for i in range(len(prompts))]
        return [reward(**row)[0] for row in reversed(rows)][::-1]

    return backwards


class TestOwnCopy:
    @pytest.mark.skipif(Version(trl.__version__) < Version("1.14"), reason="Generation has other arguments.")
    def test_training_with_tools(self, path, tmp_path, warnings_logged, monkeypatch):
        """As TRL's own test: a call, one with a wrong argument, one without a name, and no call at all."""
        reward = Watched(EndogenousReward(path))
        kwargs = {"prompts": [QUESTION], "num_generations": 4, "max_completion_length": 200}
        trainer = make_trainer(path, reward, tmp_path, tools=[multiply], **kwargs)
        calls = [
            '{"name": "multiply", "arguments": {"a": 3, "b": 4}}',
            '{"name": "multiply", "arguments": {"a": 3, "c": 4}}',
            '{"arguments": {"a": 3, "b": 4}}',
        ]
        texts = [*(f"<tool_call>\n{call}\n</tool_call><|im_end|>" for call in calls), "I know no tool.<|im_end|>"]
        tokenizer = trainer.processing_class

        def generate(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
            answers = texts if len(prompt_ids) == 4 else ["Done!<|im_end|>"] * len(prompt_ids)
            return [encode(tokenizer, text) for text in answers], None

        monkeypatch.setattr(trainer, "_generate_single_turn", generate)
        trainer.train()
        assert reward.prompt_ids == trainer._tokenize_prompts([QUESTION])[0] * 4
        rows = reward.rows[-1]
        scored = [tokenizer.decode([row.completion_ids[i] for i in row.action_positions]) for row in rows]
        assert scored == [texts[0] + "Done!<|im_end|>", texts[1] + "Done!<|im_end|>", *texts[2:]]
        assert all(row.finished for row in rows)
        assert not warnings_logged()

    def test_tools_of_environments(self, path, tmp_path):
        class Nothing:
            def reset(self, **kwargs: Any) -> None: ...

        class Multiplier(Nothing):
            def multiply(self, a: int, b: int) -> int:
                return a * b

        Multiplier.multiply.__doc__ = multiply.__doc__
        reward = Watched(EndogenousReward(path))
        factories = {"multiplier": Multiplier, "nothing": Nothing}
        trainer = make_trainer(path, reward, tmp_path, environment_factory=factories)
        trainer._batch_environments = names = ["multiplier", "nothing", "nothing", "multiplier"]
        read = trainer._tokenize_prompts(PROMPTS * 2)[0]
        ask(trainer, PROMPTS * 2, *answers(trainer.processing_class, 4), environment=names)
        assert reward.prompt_ids == read
        texts = trainer.processing_class.batch_decode(read)
        assert ["multiply" in text for text in texts] == [True, False, False, True]

    def test_what_a_rollout_made_of_the_prompts(self, path, tmp_path, warnings_logged):
        tokenizer = AutoTokenizer.from_pretrained(path)
        expected = tokenizer("Q: What is 3 times 4? A:")["input_ids"]
        reward = Watched(EndogenousReward(path))
        rollout = rollout_of(expected, answers(tokenizer, 1)[1][0])
        make_trainer(path, reward, tmp_path, prompts=[QUESTION], rollout_func=rollout).train()
        assert reward.prompt_ids == [expected] * 4
        (warning,) = warnings_logged()
        assert f"has {len(expected)} tokens for the policy" in warning
        assert "they differ from token 0 on: 'Q:" in warning and "The policy's prompts are scored." in warning

    @pytest.mark.parametrize(
        "asked",
        [
            lambda reward: reward,
            pytest.param(
                lambda reward: RoutedReward({"a": reward, "b": lambda prompts, **_: [0.0] * len(prompts)}),
                marks=pytest.mark.skipif(Version(trl.__version__) < Version("1.14"), reason="It is not awaited."),
            ),
            last_first,
        ],
        ids=["by the trainer", "for some rows, from another thread", "for one row after another"],
    )
    def test_what_an_environment_writes(self, asked, path, tmp_path):
        """Tokens of `env_mask` 0 are read, but their log-probability is no part of the reward; whoever asks for it."""
        tokenizer = AutoTokenizer.from_pretrained(path)
        prompt = tokenizer("Q: 3 times 4? A:")["input_ids"]
        call, result, answer = (encode(tokenizer, text) for text in ("3*4=", "12", " 12"))
        rows = [[*call, *result, *answer * i, tokenizer.eos_token_id] for i in range(4)]
        masks = [[int(not len(call) <= k < len(call + result)) for k in range(len(row))] for row in rows]

        def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
            return {"prompt_ids": [prompt] * 4, "completion_ids": rows, "logprobs": rows, "env_mask": masks}

        reward = EndogenousReward(path)
        data = Dataset.from_dict({"prompt": [QUESTION] * 2, "domain": ["a", "b"]})
        settings = {"train_dataset": data, "shuffle_dataset": False, "rollout_func": rollout}
        trainer = make_trainer(path, asked(reward), tmp_path, max_completion_length=64, **settings)
        trainer.train()
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        each = [completion_log_probs(model, prompt, row) for row in rows]
        ours = [sum(x * m for x, m in zip(row, mask, strict=True)) for row, mask in zip(each, masks, strict=True)]
        if isinstance(trainer.reward_funcs[0], RoutedReward):
            ours[2:] = [0.0, 0.0]
        assert list(trainer._logs["rewards"].values()) == [pytest.approx(ours, abs=1e-3)]

    def test_two_trainers_one_after_the_other(self, path, tmp_path):
        reward = Watched(EndogenousReward(path))
        for thinks in (True, False, True):
            trainer = make_trainer(path, reward, tmp_path, chat_template_kwargs={"enable_thinking": thinks})
            assert_reads_as_policy(trainer, reward)


class TestGiven:
    """Arguments of the reward take precedence."""

    def test_arguments_of_the_template(self, path, tmp_path, warnings_logged):
        reward = Watched(EndogenousReward(path, chat_template_kwargs={"enable_thinking": True}))
        kwargs = {"chat_template_kwargs": {"enable_thinking": False}, "max_steps": 2}
        trainer = make_trainer(path, reward, tmp_path, prompts=[QUESTION], **kwargs)
        trainer.train()
        expected = templated(trainer.processing_class, QUESTION)
        assert reward.prompt_ids == [expected] * 4
        (warning,) = warnings_logged()
        read = trainer._tokenize_prompts([QUESTION])[0][0]
        assert f"has {len(read)} tokens for the policy and {len(expected)} for the reward" in warning
        assert f"from token {len(expected)} on: '<think>\\n' for the policy, ''" in warning
        assert "The reward's prompts are scored" in warning and "Remove these arguments" in warning

    def test_a_tokenizer_with_another_template(self, path, tmp_path, warnings_logged):
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = "{{ tools | length }} tool, {{ messages[0].content }}"
        reward = Watched(EndogenousReward(path, tokenizer))
        trainer = make_trainer(path, reward, tmp_path, prompts=[QUESTION], tools=[multiply])
        trainer.train()
        expected = encode(tokenizer, "1 tool, What is 3 times 4?")
        assert reward.prompt_ids == [expected] * 4
        (warning,) = warnings_logged()
        assert "policy and the reward read different prompts" in warning


def test_another_tokenizer_keeps_its_template(path, tiny_policy_path, tmp_path):
    """It only gets the tools and arguments that its template uses; the policy's token ids mean nothing to it."""
    reward = Watched(EndogenousReward(tiny_policy_path))
    trainer = make_trainer(path, reward, tmp_path, tools=[multiply])
    ask(trainer, [[{"role": "user", "content": "a b"}]], *answers(trainer.processing_class, 1))
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path)
    assert tokenizer.decode(reward.prompt_ids[0]) == "<user> a b <assistant>"
    assert reward.reward.chat_template_kwargs == {"tools": [multiply]}


def test_tokens_that_were_added_to_the_policys_tokenizer(path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.chat_template = "[INST] {{ messages[0].content }} [/INST]"
    model = LlamaForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    reward = Watched(EndogenousReward(path))
    trainer = make_trainer(str(tmp_path / "policy"), reward, tmp_path)
    assert_reads_as_policy(trainer, reward)


class TestBind:
    def test_before_training(self, path, tmp_path):
        reward = EndogenousReward(path)
        trainer = make_trainer(path, reward, tmp_path, tools=[multiply], **NOT_THINKING)
        assert reward.bind(trainer) is reward and not reward.is_shared
        expected = {"enable_thinking": False, "tools": [multiply], "chat_template": trainer.chat_template}
        assert reward.chat_template_kwargs == expected
        (row,) = reward._render([QUESTION], ["12"], None, {})
        assert row.prompt_ids == trainer._tokenize_prompts([QUESTION])[0][0]
        copy = Watched(pickle.loads(pickle.dumps(reward)))
        assert copy.reward.chat_template_kwargs == {}  # of no trainer
        trainer.reward_funcs = [copy]
        assert_reads_as_policy(trainer, copy)
        # Without tools there is no empty list of them: Llama's template would mention tools.
        assert PromptSettings.of(make_trainer(path, copy, tmp_path)).chat_template_kwargs == {}

    @pytest.mark.skipif(Version(trl.__version__) < Version("1.15"), reason="The trainers of endotrl need TRL 1.15.")
    @pytest.mark.parametrize("algorithm", ["DenseGRPO", "PPO"])
    def test_our_trainers_do_it(self, algorithm, path, tmp_path):
        import endotrl

        reward = EndogenousReward(path)
        make_trainer(path, reward, tmp_path, getattr(endotrl, f"{algorithm}Trainer"), **NOT_THINKING)
        assert reward.chat_template_kwargs == {"enable_thinking": False}


class TestOnlineDPO:
    @pytest.mark.parametrize("placement", ["own copy", "attached"])
    def test_an_open_answer_is_continued(self, placement, path, tmp_path):
        reward = EndogenousReward(path if placement == "own copy" else None)
        watched = Watched(reward)
        trainer = make_trainer(path, watched, tmp_path, OnlineDPOTrainer, [CONTINUED])
        if placement == "attached":
            reward.attach(trainer)
        trainer.train()
        text = trainer.processing_class.decode(watched.prompt_ids[0])
        assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nIt is")

    def test_plain_text_has_no_special_tokens(self, path, tmp_path):
        folder = str(tmp_path / "with-bos")
        tokenizer = with_bos(AutoTokenizer.from_pretrained(path))
        tokenizer.save_pretrained(folder)
        LlamaForCausalLM.from_pretrained(path).save_pretrained(folder)
        expected = encode(tokenizer, "3 times 4 is")
        reward = Watched(EndogenousReward(folder))
        make_trainer(folder, reward, tmp_path, OnlineDPOTrainer, ["3 times 4 is"]).train()
        assert reward.prompt_ids[0] == expected
        # GRPO's policy reads the BOS.
        make_trainer(folder, reward, tmp_path, prompts=["3 times 4 is"]).train()
        assert reward.prompt_ids[0] == [tokenizer.convert_tokens_to_ids(BOS), *expected]


def test_a_sentence_reward_reads_what_the_policy_reads(path, tmp_path):
    model = SentenceRewardModel.from_backbone(path, SentenceRewardConfig(attention_dim=8))
    reward = SentenceReward(model, AutoTokenizer.from_pretrained(path))
    trainer = make_trainer(path, reward, tmp_path, **NOT_THINKING)
    completions, ids = answers(trainer.processing_class, 1)
    ask(trainer, [QUESTION], completions, ids)
    (row,) = reward._prompts.of()([QUESTION], completions, ids)
    read = trainer._tokenize_prompts([QUESTION])[0][0]
    assert row.input_ids[: len(read)] == read
    assert reward.policy_processing_class is trainer.processing_class


@pytest.mark.parametrize("writes_bos", [None, False, True], ids=["none", "tokenizer", "template and tokenizer"])
def test_a_processors_own_template_bos_and_parts(writes_bos, path):
    tokenizer = AutoTokenizer.from_pretrained(path, additional_special_tokens=["<image>"], image_token="<image>")
    if writes_bos is not None:
        with_bos(tokenizer)
    tokenizer.chat_template = None
    template = ("{{ bos_token }}" if writes_bos else "") + (TEMPLATES / "llava_next.jinja").read_text()
    processor = LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=14, chat_template=template)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Two plus two?"}]}]
    text = [{"role": "user", "content": "Two plus two?"}]
    expected = processor.apply_chat_template(parts, add_generation_prompt=True, tokenize=True)[0]
    assert expected.count(tokenizer.convert_tokens_to_ids(BOS)) == (writes_bos is not None)
    answer = [{"role": "assistant", "content": "Four."}]
    reward = EndogenousReward(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SMALL)), processor)
    rows = reward._render([parts, text], [answer] * 2, None, {})
    rows += reward._render([parts] * 2, ["", "Four."], [[tokenizer.eos_token_id], [259] * 9], {})  # foreign ids
    assert [row.prompt_ids for row in rows] == [expected] * 4
    written = [tokenizer.decode(row.completion_ids).lstrip() for row in rows]
    assert written == ["Four.<|im_end|>"] * 2 + ["<|im_end|>", "Four.<|im_end|>"]


class TestColumnsOfDatasets:
    """Rows of datasets may bring `tools` and `chat_template_kwargs`, as TRL's `DPOTrainer` and `RewardTrainer` know."""

    TOOLS = [{"type": "function", "function": {"name": "multiply", "parameters": {"type": "object"}}}]

    @pytest.mark.parametrize("kind", ["endogenous", "sentence"])
    def test_each_row_is_rendered_by_its_own(self, kind: str, path: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(path)
        arguments = ({"tools": self.TOOLS}, {}, {"enable_thinking": False})
        expected = [templated(tokenizer, QUESTION, **kwargs) for kwargs in arguments]
        assert len({len(ids) for ids in expected}) == 3
        columns = {"tools": [self.TOOLS, None, None], "chat_template_kwargs": [None, None, {"enable_thinking": False}]}
        completions = answers(tokenizer, 3)[0]
        if kind == "endogenous":
            reward = Watched(EndogenousReward(path))
            reward(prompts=[QUESTION] * 3, completions=completions, **columns)
            assert reward.prompt_ids == expected
            return
        model = SentenceRewardModel.from_backbone(path, SentenceRewardConfig(attention_dim=8, marker=False)).eval()
        together = SentenceReward(model, tokenizer)([QUESTION] * 3, completions, **columns)
        for i, ids in enumerate(expected):  # as text, which has no template
            alone = SentenceReward(model, tokenizer)([tokenizer.decode(ids)], ["12"])
            assert together[i] == pytest.approx(alone[0], abs=1e-5)

    def test_a_trainer_of_reward_functions_reads_no_such_columns(self, path: str, tmp_path: Path) -> None:
        reward = Watched(EndogenousReward(path))
        trainer = make_trainer(path, reward, tmp_path)
        ask(trainer, PROMPTS, *answers(trainer.processing_class, 2), tools=[self.TOOLS] * 2)
        assert reward.prompt_ids == trainer._tokenize_prompts(PROMPTS)[0]

    def test_files(self, path: str, tmp_path: Path) -> None:
        rows = [{"prompt": QUESTION, "completion": answers(AutoTokenizer.from_pretrained(path), 1)[0][0]}] * 3
        rows = [rows[0] | {"tools": self.TOOLS}, rows[1], rows[2] | {"tools": json.dumps(self.TOOLS)}]
        (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
        reward = EndogenousReward(path)
        score_file(reward, tmp_path / "in.jsonl", tmp_path / "out.jsonl", {})
        found = [json.loads(line)["reward"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        given = EndogenousReward(path, chat_template_kwargs={"tools": self.TOOLS})
        with_tools, without = (r([QUESTION], [rows[0]["completion"]])[0] for r in (given, reward))
        assert found == pytest.approx([with_tools, without, with_tools], abs=1e-5) and with_tools != without

    def test_keys_in_the_order_that_they_have(self, path):
        tokenizer = AutoTokenizer.from_pretrained(path)
        tools = [self.TOOLS, [{"function": self.TOOLS[0]["function"], "type": "function"}]]
        assert tools[0] == tools[1]
        calls = [{"name": "f", "arguments": arguments} for arguments in ({"a": 1, "b": 2}, {"b": 2, "a": 1})]
        called = [
            [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}]
            for call in calls
        ]
        for prompts, columns in (([QUESTION] * 2, {"tools": tools}), (called, {})):
            reward = Watched(EndogenousReward(path))
            reward(prompts=prompts, completions=answers(tokenizer, 2)[0], **columns)
            own = columns.get("tools", [None] * 2)
            expected = [templated(tokenizer, prompt, tools=t) for prompt, t in zip(prompts, own, strict=True)]
            assert reward.prompt_ids == expected and expected[0] != expected[1]
