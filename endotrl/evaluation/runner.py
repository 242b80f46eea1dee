# SPDX-License-Identifier: Apache-2.0
"""From items to scores: block by block, behind what an earlier run has done."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm.auto import tqdm

from ..runs.jsonl import append_lines
from ..runs.processes import processes
from ..runs.shards import share
from .engine import Engine, ModelScorer, ScoredResponse
from .forms import token_counts
from .items import Item
from .run_folder import RunFolder, merge_line
from .scorer_names import Scorer, base_names, make_form, needs_model


BLOCK_SIZE = 32  # items that are scored and saved together


def score_items(
    items: Sequence[Item],
    names: Sequence[str],  # in [`expand_names`]'s form
    folder: RunFolder,
    make_engine: Callable[[], Engine],  # loads the model when it is needed first
    make_scorer: Callable[[str, Engine], Scorer],  # of the scorers that run a model by themselves
    keep_stats: bool = True,  # write token statistics
    block_size: int = BLOCK_SIZE,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """
    Scores what is not scored yet; returns, by key of the item, `{"tokens", "scores": {scorer: [...]}, "seconds",
    "cut"}`, complete in the main process.

    All forms of the reward come from one forward pass over an item. Where its token statistics are in the folder
    already, there is no forward pass, and if nothing else needs the model, it is not even loaded. Under `accelerate
    launch`, all processes call this with the same items, and each scores blocks of like total length.
    """
    bases = base_names(names)
    forms = {name: make_form(name) for name in bases if not needs_model(name)}
    alone = any(form.needs_alone for form in forms.values())
    records = folder.read_scores()
    todo = list(
        {i.key: i for i in items if i.key not in records or not records[i.key]["scores"].keys() >= set(bases)}.values()
    )
    state = processes()
    state.wait_for_everyone()  # who is ahead writes nothing that others have yet to see missing
    engine: Engine | None = None
    scorers: dict[str, Scorer] = {}
    done = len(items) - len(todo)
    with tqdm(total=len(items), initial=done, desc="Evaluating", unit=" items", disable=not progress) as bar:
        blocks = [todo[start : start + block_size] for start in range(0, len(todo), block_size)]
        sized = ((sum(len(str(item.responses)) for item in block), block) for block in blocks)
        for block in share(sized, state.process_index, state.num_processes):
            began = time.perf_counter()
            missing = [item for item in block if not _has_stats(folder, item, alone)]
            fresh: dict[str, list[ScoredResponse]] = {}
            if missing:
                engine = engine or make_engine()
                scored = engine.score(missing, alone=alone)
                fresh = {item.key: row for item, row in zip(missing, scored, strict=True)}
                if keep_stats:
                    folder.stats.save(missing, scored)
            responses = [fresh[item.key] if item.key in fresh else folder.stats.load(item.key) for item in block]
            new: list[dict[str, list[float]]] = [{} for _ in block]
            for name in bases:
                known = [records.get(item.key, {"scores": {}})["scores"] for item in block]
                wanted = [k for k, scores in enumerate(known) if name not in scores]
                if not wanted:
                    continue
                if name in forms:
                    rows = [forms[name].score(block[k], responses[k]) for k in wanted]
                else:
                    engine = engine or make_engine()
                    if name not in scorers:
                        scorers[name] = make_scorer(name, engine)
                    rows = _score_by_model(scorers[name], [block[k] for k in wanted], progress)
                for k, row in zip(wanted, rows, strict=True):
                    new[k][name] = row
            seconds = (time.perf_counter() - began) / len(block)
            lines = [
                {
                    "key": item.key,
                    "id": item.id,
                    "tokens": token_counts(item, row),
                    "cut": sum(response.cut for response in row),
                    "scores": scores,
                    "seconds": round(seconds, 4),
                }
                for item, row, scores in zip(block, responses, new, strict=True)
            ]
            append_lines(folder.scores_path, lines)
            for line in lines:
                merge_line(records, line)
            bar.update(len(block))
    if state.num_processes > 1:
        state.wait_for_everyone()
        folder.stats.find()
        return folder.read_scores()
    return records


def _has_stats(folder: RunFolder, item: Item, alone: bool) -> bool:
    if item.key not in folder.stats:
        return False
    return not alone or all(response.log_probs_alone is not None for response in folder.stats.load(item.key))


def _score_by_model(scorer: Scorer, items: Sequence[Item], progress: bool) -> list[list[float]]:
    assert isinstance(scorer, ModelScorer)
    rows = scorer.score_items(items, progress)
    # Equal responses tie, though another batch may have changed the last bit.
    return [
        [row[item.responses.index(response)] for response in item.responses]
        for item, row in zip(items, rows, strict=True)
    ]
