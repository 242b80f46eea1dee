# SPDX-License-Identifier: Apache-2.0
"""
What [`studies.sentence_reward`] learns from: pairs of answers, and the states of SmolLM2-135M-Instruct, frozen, at the
ends of their sentences, at several depths. Made once, in files of a few pairs, so that an interrupted run goes on.
"""

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from endotrl import EndogenousReward
from endotrl.frozen.quickstart_model import quickstart_model_path
from endotrl.rewards import SentencePooledReward
from endotrl.runs.files import replacing
from endotrl.scoring.batching import pad_ids, plan_batches
from endotrl.sentence import RuleSegmenter, SentenceEncoder, SentenceRewardConfig
from endotrl.tasks import facts


DEPTHS = (13, 16, 19, 22)  # layers of 30
SOLUTIONS = ("prmbench", "processbench")  # whose sentences are lines, the steps
MAX_TOKENS = {True: 768, False: 256}  # of prompt and answer, of solutions or not
PAIRS_PER_FILE = 50
PREFERENCES = 1600  # pairs of `helpful`, and all of `webgpt`
DATASETS = ("facts", "fresh", "helpful", "webgpt", "prmbench", "processbench")
FACTS_PAIRS = {"train": 1200, "dev": 200, "test": 400}


@dataclass(frozen=True)
class Pair:
    """
    Two answers, the better one first; and which of their sentences are right, if that is known. (`None`: of a sentence,
    neither.) Both answer `prompt`, unless the second one has another.
    """

    prompt: list[dict[str, str]]
    answers: tuple[str, str]
    right: tuple[list[Any], list[Any]] | None = None
    part: str = ""
    other_prompt: list[dict[str, str]] | None = None

    @property
    def prompts(self) -> list[list[dict[str, str]]]:
        """Of both answers."""
        return [self.prompt, self.other_prompt or self.prompt]


def load_pairs(dataset: str, data: Path) -> list[Pair]:
    """Pairs of one of `DATASETS`, in a fixed order; `data` is the folder of the files."""
    if dataset == "facts":
        train, test = facts.load_questions()
        train = list({question.statement: question for question in train}.values())  # each in one phrasing
        return _facts({"train": train[50:], "dev": train[:50], "test": test})
    if dataset == "fresh":
        return _facts({"test": _fresh_questions()})
    if dataset == "prmbench":
        return _prmbench(data / "prmbench" / "step_contradiction.jsonl")
    if dataset == "processbench":
        return _processbench(data / "processbench" / "gsm8k.json")
    name = {"helpful": "hh_helpful", "webgpt": "webgpt"}[dataset]
    with gzip.open(data / "preferences" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    pairs = [pair for row in rows if (pair := pair_of_dialogues(row)) is not None]
    random.Random(0).shuffle(pairs)
    return pairs[:PREFERENCES]


def _fresh_questions() -> list[facts.Question]:
    """Facts of other kinds, which nobody had looked at before the arms were there."""
    relations = json.loads(Path(__file__).with_name("fresh_facts.json").read_text(encoding="utf-8"))["relations"]
    return [
        facts.Question(relation["name"], "", answers, relation["statement"].replace("{subject}", subject))
        for relation in relations
        for subject, answers in relation["facts"]
    ]


def _facts(parts: dict[str, list[facts.Question]]) -> list[Pair]:
    """
    Answers of 3 to 6 sentences, each a fact that is right or has the answer of another question of its kind; the
    better answer, about the same facts, has more that are right. No fact is in two parts.
    """
    pairs = []
    for part, questions in parts.items():
        generator = random.Random(part)
        while sum(pair.part == part for pair in pairs) < FACTS_PAIRS[part]:
            chosen = generator.sample(questions, generator.randint(3, 6))
            first, second = ([generator.random() < 0.5 for _ in chosen] for _ in range(2))
            if sum(first) == sum(second):
                continue
            right = (first, second) if sum(first) > sum(second) else (second, first)
            texts = [
                " ".join(
                    statement(q, is_right, questions, generator) for q, is_right in zip(chosen, flags, strict=True)
                )
                for flags in right
            ]
            prompt = [{"role": "user", "content": f"Tell me {len(chosen)} facts."}]
            pairs.append(Pair(prompt, (texts[0], texts[1]), right, part))
    return pairs


def statement(
    question: facts.Question, is_right: bool, questions: Sequence[facts.Question], generator: random.Random
) -> str:
    """The fact in a sentence, with its answer or that of another question of its kind."""
    others = [
        other.answers[0]
        for other in questions
        if other.relation == question.relation and not set(other.answers) & set(question.answers)
    ]
    return question.statement.replace("{answer}", question.answers[0] if is_right else generator.choice(others))


def _prmbench(path: Path) -> list[Pair]:
    """Solutions against themselves with a wrong step; steps are the sentences. Steps after the first wrong one do not
    count as right or wrong: they follow from it."""
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        steps = [[" ".join(step.split()) for step in row[f"{kind}_process"]] for kind in ("original", "modified")]
        if not row["error_steps"] or not all(all(part) for part in steps) or steps[0] == steps[1]:
            continue
        right = [True] * len(steps[0]), [i + 1 not in row["error_steps"] for i in range(len(steps[1]))]
        pairs.append(
            Pair(
                [{"role": "user", "content": row["modified_question"]}],
                ("\n".join(steps[0]), "\n".join(steps[1])),
                right,
            )
        )
    random.Random(0).shuffle(pairs)
    return pairs


def _processbench(path: Path) -> list[Pair]:
    """
    Right solutions against wrong ones of other problems, since each problem has one; each is in one pair. Steps after
    the first wrong one are neither right nor wrong.
    """
    rows = json.loads(path.read_text(encoding="utf-8"))
    random.Random(0).shuffle(rows)
    pairs = []
    for both in zip(*([row for row in rows if (row["label"] == -1) == is_right] for is_right in (True, False))):  # noqa: B905
        prompts = [[{"role": "user", "content": row["problem"]}] for row in both]
        texts = ["\n".join(" ".join(step.split()) for step in row["steps"]) for row in both]
        first, wrong = len(both[0]["steps"]), both[1]["label"]
        flags = [True] * first, [True] * wrong + [False] + [None] * (len(both[1]["steps"]) - wrong - 1)
        pairs.append(Pair(prompts[0], (texts[0], texts[1]), flags, "", prompts[1]))
    return pairs


def pair_of_dialogues(row: dict[str, str]) -> Pair | None:
    """The pair of two dialogues that differ in the last turn alone."""
    chosen, rejected = _turns(row["chosen"]), _turns(row["rejected"])
    if chosen[:-1] == rejected[:-1] != [] and chosen[-1]["content"] and rejected[-1]["content"]:
        return Pair(chosen[:-1], (chosen[-1]["content"], rejected[-1]["content"]))
    return None


def _turns(dialogue: str) -> list[dict[str, str]]:
    """A dialogue with `Human:` and `Assistant:`, or the same as headings, as messages."""
    roles = {"Human": "user", "Assistant": "assistant"}
    turns: list[dict[str, str]] = []
    for part in dialogue.split("\n\n"):
        name, _, content = part.removeprefix("## ").partition(":")
        if name in roles:
            turns.append({"role": roles[name], "content": content.strip()})
        elif turns:
            turns[-1]["content"] += f"\n\n{part}"
    return turns


def lines(text: str) -> list[tuple[int, int]]:
    """Lines as sentences."""
    ends = [i + 1 for i, character in enumerate(text) if character == "\n"]
    cuts = [0, *ends, *([len(text)] if not ends or ends[-1] < len(text) else [])]
    return list(zip(cuts, cuts[1:], strict=False))


class States:
    """
    Frozen states, made or read. A response has states of shape `(depths, N + 1, D)`: before it, at the last token of
    every sentence (EOS is none of the last one's), and at EOS.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.path = quickstart_model_path()
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)

    def pairs(self, dataset: str) -> list[Pair]:
        """The pairs of a dataset, with those that have no states."""
        return load_pairs(dataset, self.data)

    def read(self, dataset: str, limit: int | None = None) -> list[dict[str, Any]]:
        """
        One row per pair with `states` of both answers, `right` and `part`; for those of which wrong sentences are
        known and that are no training pairs, `endogenous`, the rewards of sentences.
        """
        pairs = self.pairs(dataset)[:limit]
        encode = SentenceEncoder(self.tokenizer, self._config(), lines if dataset in SOLUTIONS else RuleSegmenter())
        rows: list[dict[str, Any]] = []
        for start in tqdm(range(0, len(pairs), PAIRS_PER_FILE), desc=f"Frozen states, {dataset}", unit=" files"):
            path = self.folder / f"{dataset}-{start:05d}.pt"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                made = self._make(dataset, pairs[start : start + PAIRS_PER_FILE], encode)
                with replacing(path) as file:
                    torch.save(made, file)
            rows += torch.load(path, weights_only=True)
        return rows

    def _config(self) -> SentenceRewardConfig:
        from transformers import AutoConfig

        return SentenceRewardConfig(AutoConfig.from_pretrained(self.path), marker=False)

    def _make(self, dataset: str, pairs: Sequence[Pair], encode: SentenceEncoder) -> list[dict[str, Any]]:
        prompts = [prompt for pair in pairs for prompt in pair.prompts]
        completions = [[{"role": "assistant", "content": text}] for pair in pairs for text in pair.answers]
        encoded = encode(prompts, completions)
        longest = MAX_TOKENS[dataset in SOLUTIONS]
        fits = [all(len(row.input_ids) <= longest for row in encoded[2 * i : 2 * i + 2]) for i in range(len(pairs))]
        wanted = [i for i in range(2 * len(pairs)) if fits[i // 2]]
        states: dict[int, Tensor] = {}
        model = self._backbone
        for batch in plan_batches([len(encoded[i].input_ids) for i in wanted], 4096):
            rows = [wanted[j] for j in batch]
            ids, mask = pad_ids([encoded[i].input_ids for i in rows], 0)
            with torch.no_grad():
                hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            for j, i in enumerate(rows):
                eos = encoded[i].sentence_ends[-1]
                places = [*encoded[i].sentence_ends[:-1], eos - 1, eos]
                states[i] = torch.stack([hidden.hidden_states[depth][j, places] for depth in DEPTHS])
        endogenous: dict[int, list[float]] = {}
        judged = [i for i in wanted if pairs[i // 2].right is not None and pairs[i // 2].part != "train"]
        if judged:
            reward = SentencePooledReward(
                self._endogenous, self.tokenizer, lines if dataset in SOLUTIONS else RuleSegmenter()
            )
            scores = reward.outcome_and_token_rewards(
                [prompts[i] for i in judged],
                [completions[i] for i in judged],
                completion_ids=[encoded[i].completion_ids for i in judged],
            )
            for i, token_rewards in zip(judged, scores[1], strict=True):
                endogenous[i] = token_rewards[encoded[i].sentences.last_tokens].tolist()
        made = []
        for i, pair in enumerate(pairs):
            first, second = 2 * i, 2 * i + 1
            if first not in states:
                continue
            row = {"states": [states[first], states[second]], "part": pair.part}
            if pair.right is not None:
                counts = [states[k].shape[1] - 2 for k in (first, second)]
                if [len(flags) for flags in pair.right] != counts:
                    continue  # the segmenter has cut elsewhere
                row["right"] = [list(flags) for flags in pair.right]
                if first in endogenous:
                    row["endogenous"] = [[round(v, 4) for v in endogenous[i]] for i in (first, second)]
            made.append(row)
        return made

    @cached_property
    def _backbone(self) -> Any:
        model = AutoModel.from_pretrained(self.path, num_hidden_layers=max(DEPTHS), dtype=torch.bfloat16).eval()
        model.norm = nn.Identity()  # of the last layer, which this is not
        return model

    @cached_property
    def _endogenous(self) -> EndogenousReward:
        return EndogenousReward(self.path, dtype="bfloat16")
