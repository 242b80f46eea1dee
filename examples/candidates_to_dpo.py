# SPDX-License-Identifier: Apache-2.0
"""
From candidate answers to DPO in one file: no labels, no reward model, no reinforcement learning.

1. Sample `N` answers to each question from the model.
2. Rank them by the model's own endogenous reward, without what length and style explain, and pair the best answer
   with the worst: a preference dataset of TRL.
3. Train on the pairs with TRL's `DPOTrainer`.

    python examples/candidates_to_dpo.py quickstart --output dpo-output

Steps 1 and 2 on files of your own: `endotrl pairs candidates.jsonl --model MODEL --output pairs.jsonl`, and then
`load_dataset("json", data_files="pairs.jsonl")`.
"""

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import DPOConfig, DPOTrainer

from endotrl import EndogenousReward, preference_pairs
from endotrl.frozen.names import resolve_model
from endotrl.tasks.facts import load_questions


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Any], num_candidates: int, length: int
) -> list[dict[str, Any]]:
    """Step 1: rows of prompt and completions, with the tokens, which tell whether an answer came to its end."""
    inputs = tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
    ).to(model.device)
    output = model.generate(
        **inputs, max_new_tokens=length, do_sample=True, top_k=0, num_return_sequences=num_candidates
    )
    end = tokenizer.eos_token_id
    answers = []
    for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
        ids = ids[: ids.index(end) + 1] if end in ids else ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        answers.append(([{"role": "assistant", "content": text}], ids))
    return [
        {"prompt": prompt, "completions": [text for text, _ in group], "completion_ids": [ids for _, ids in group]}
        for i, prompt in enumerate(prompts)
        for group in [answers[i * num_candidates : (i + 1) * num_candidates]]
    ]


def main() -> None:
    """Samples, pairs and trains; prints what each step made."""
    parser = argparse.ArgumentParser(description="From candidate answers to DPO, in one file.")
    parser.add_argument("model", help='path or hub id of a chat model, or "quickstart" for SmolLM2-135M-Instruct')
    parser.add_argument("--questions", type=int, default=64, help="questions (default: 64)")
    parser.add_argument("--num-candidates", type=int, default=4, help="answers to each (default: 4)")
    parser.add_argument("--length", type=int, default=48, help="longest answer, in tokens (default: 48)")
    parser.add_argument("--steps", type=int, default=24, help="updates (default: 24)")
    parser.add_argument("--output", default="dpo-output", help="folder of the trained model (default: dpo-output)")
    args = parser.parse_args()
    set_seed(0)
    path = resolve_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    on_cpu = not torch.accelerator.is_available()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu" if on_cpu else "auto")

    prompts = [question.prompt for question in load_questions()[0][: args.questions]]
    candidates = []
    for start in range(0, len(prompts), 16):
        candidates += sample(model, tokenizer, prompts[start : start + 16], args.num_candidates, args.length)
    # Of what others wrote, a discounted sum tells more than the sum; see docs/eval.md.
    reward = EndogenousReward(path, aggregate="discounted=0.93")
    pairs = preference_pairs(reward, candidates, residual="style_residual")
    print(f"{len(pairs)} pairs from {len(candidates)} questions with {args.num_candidates} answers each. The first:")
    for name in ("prompt", "chosen", "rejected"):
        print(f"  {name}: {pairs[0][name][-1]['content']!r}")

    settings = DPOConfig(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-6,
        beta=0.1,
        logging_steps=max(1, args.steps // 4),
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=on_cpu,
    )
    trainer = DPOTrainer(model, args=settings, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    for log in trainer.state.log_history:
        if "rewards/accuracies" in log:
            print(f"step {log['step']}: loss {log['loss']:.3f}, pairs told apart {log['rewards/accuracies']:.0%}")
    trainer.save_model(args.output)
    print(f"The model is in {args.output}.")


if __name__ == "__main__":
    main()
