# SPDX-License-Identifier: Apache-2.0
"""From items to scores: block by block, behind what an earlier run has done."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from .engine import Engine
from .forms import token_counts
from .items import Item
from .run_folder import RunFolder, in_blocks
from .scorer_names import base_names, make_form, needs_model


BLOCK_SIZE = 32  # items that are scored and saved together


def score_items(
    items: Sequence[Item],
    names: Sequence[str],  # in [`expand_names`]'s form
    folder: RunFolder,
    make_engine: Callable[[], Engine],  # loads the model when it is needed first
    make_scorer: Callable[[str, Engine], Any],  # of the scorers that run a model by themselves
    block_size: int = BLOCK_SIZE,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """
    Scores what is not scored yet; returns, by key of the item, `{"tokens", "scores": {scorer: [...]}, "seconds",
    "cut"}`. All forms of the reward come from one forward pass over an item, and from none where its token statistics
    are in the folder: if nothing else needs the model, it is not even loaded. The processes of `accelerate launch`
    share the items.
    """
    bases = base_names(names)
    forms = {name: make_form(name) for name in bases if not needs_model(name)}
    alone = any(form.needs_alone for form in forms.values())
    records = folder.read_scores()
    known = {item.key: records.get(item.key, {"scores": {}})["scores"] for item in items}
    todo = list({item.key: item for item in items if not known[item.key].keys() >= set(bases)}.values())
    engine = cache(make_engine)
    scorer = cache(lambda name: make_scorer(name, engine()))

    def score(block: list[Item]) -> list[dict[str, Any]]:
        missing = [item for item in block if not _has_stats(folder, item, alone)]
        scored = engine().score(missing, alone=alone) if missing else []
        fresh = {item.key: row for item, row in zip(missing, scored, strict=True)}
        if missing:
            folder.stats.save(fresh)
        responses = {item.key: fresh.get(item.key) or folder.stats.load(item.key) for item in block}
        new: dict[str, dict[str, list[float]]] = {item.key: {} for item in block}
        for name in bases:
            wanted = [item for item in block if name not in known[item.key]]
            if name in forms:
                rows = [forms[name].score(item, responses[item.key]) for item in wanted]
            else:
                rows = scorer(name).score_items(wanted, progress) if wanted else []
            for item, row in zip(wanted, rows, strict=True):
                new[item.key][name] = row
        return [
            {
                "key": item.key,
                "id": item.id,
                "tokens": token_counts(item, responses[item.key]),
                "cut": sum(response.cut for response in responses[item.key]),
                "scores": new[item.key],
            }
            for item in block
        ]

    path, done = folder.scores_path, len(items) - len(todo)
    in_blocks(todo, path, score, "Evaluating", progress, done, block_size, lambda item: len(str(item.responses)))
    folder.stats.find()  # what other processes have saved
    return folder.read_scores()


def _has_stats(folder: RunFolder, item: Item, alone: bool) -> bool:
    if item.key not in folder.stats:
        return False
    return not alone or all(response.log_probs_alone is not None for response in folder.stats.load(item.key))
