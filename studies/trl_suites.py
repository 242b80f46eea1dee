# SPDX-License-Identifier: Apache-2.0
"""
TRL's own tests with the rewards and trainers of this package in the place of TRL's.

`--mode` says what is substituted (several can be given): `trl`, nothing; `own-copy`, every reward becomes an
[`EndogenousReward`] with a copy of the policy's first weights; `attach`, one that shares the trainer's frozen weights
(tests without any are skipped); `dense` and `ppo`, `GRPOTrainer` becomes [`DenseGRPOTrainer`] or [`PPOTrainer`];
`float32`, trainers compute in float32 instead of bfloat16, so that attached rewards must agree as closely as others.
Every endogenous reward is compared with the log-probability of the trainer's own token ids in float32, one row alone
(`studies.trl_suites_plugin`). What fails with `--mode trl` too is not a difference.

TRL's tests are not in its wheel: take `tests/` from a clone. Random models of the same families, made once in `--work`,
stand in for those of the hub, with one tokenizer for all; token ids that a test writes out are those of the text in the
comment beside them. Tests of tools need `jmespath`. A test that has a line in `--results` is not run again.

    python -m studies.trl_suites --tests trl/tests --mode own-copy --files test_rloo_trainer.py --results rloo.jsonl
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any


MODES = ("trl", "own-copy", "attach", "dense", "ppo", "float32")
FILES = ("test_grpo_trainer.py", "test_rloo_trainer.py", "experimental/test_online_dpo_trainer.py")
SIZES = "hidden_size=16 intermediate_size=32 num_hidden_layers=2 num_attention_heads=4 num_key_value_heads=2"
EXPERTS = "num_experts=4 num_experts_per_tok=2 moe_intermediate_size=16 head_dim=4"
MAMBA = (
    'layers_block_type=["mamba","attention","moe"] mamba_num_heads=8 mamba_head_dim=4 mamba_n_groups=1 '
    "ssm_state_size=16 mamba_d_conv=4 mamba_expand=2 n_routed_experts=4 moe_shared_expert_intermediate_size=16"
)
# Name after `trl-internal-testing/tiny-`: TRL's chat template, EOS, settings beyond `SIZES`.
TEXT = {
    "Qwen2ForCausalLM-2.5": ("qwen2_5", "<|im_end|>", ""),
    "Qwen3ForCausalLM": ("qwen3", "<|im_end|>", ""),
    "Qwen3MoeForCausalLM": ("qwen3", "<|im_end|>", EXPERTS),
    "LlamaForCausalLM-3.2": ("llama3_2", "<|eot_id|>", ""),
    "Cohere2ForCausalLM": ("cohere2", "<|END_OF_TURN_TOKEN|>", ""),
    "Gemma2ForCausalLM": ("gemma", "<end_of_turn>", "head_dim=4"),
    "Glm4MoeForCausalLM": ("glm4moe", "<|user|>", f"{EXPERTS} n_routed_experts=4"),
    "GptOssForCausalLM": ("gptoss", "<|return|>", "num_local_experts=4 num_experts_per_tok=2 head_dim=4"),
    "NemotronHForCausalLM-nano": ("nemotron_3_nano", "<|im_end|>", f"{EXPERTS} {MAMBA}"),
    "Qwen2ForSequenceClassification-2.5": ("qwen2_5", "<|im_end|>", "num_labels=1"),
    "Qwen3ForSequenceClassification": ("qwen3", "<|im_end|>", "num_labels=1"),
    "LlamaForSequenceClassification-3.2": ("llama3_2", "<|eot_id|>", "num_labels=1"),
}
# Models that read images: the family of `tests.support.vision`, and TRL's chat template where tests need that one.
VISION = {
    "LlavaForConditionalGeneration": ("llava", ""),
    "LlavaNextForConditionalGeneration": ("llava_next", ""),
    "Gemma3ForConditionalGeneration": ("gemma3", ""),
    "Qwen2VLForConditionalGeneration": ("qwen2_vl", ""),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl", "qwen2_5_vl"),
    "Qwen3_5ForConditionalGeneration-NoThink": ("qwen3_5", "qwen3_5_nothink"),
    "Qwen3_5MoeForConditionalGeneration-3.6": ("qwen3_5_moe", "qwen3_6"),
}
# Tokens that stay in decoded text; all others that look like one are special.
PLAIN_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
OTHER_TOKENS = ["<start_of_turn>", "<end_of_turn>", "<|endoftext|>", "<|finetune_right_pad_id|>"]


def templates() -> dict[str, str]:
    """TRL's chat templates by name, unchanged: it compares them by their text."""
    import trl

    return {file.stem: file.read_text() for file in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")}


def leave_out_videos() -> None:
    """Processors without their part for videos, which needs torchvision."""
    from transformers import ProcessorMixin

    attributes: Any = ProcessorMixin.get_attributes.__func__
    ProcessorMixin.get_attributes = classmethod(lambda cls: [a for a in attributes(cls) if a != "video_processor"])


def save_tokenizer(path: Path) -> None:
    """The byte-level tokenizer of all stand-ins, with the special tokens of every family."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = sorted(templates().values())
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(sorted({t for text in texts for t in re.findall(r"<\|\w+\|>", text)} | set(OTHER_TOKENS)))
    bpe.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_TOKENS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.save_pretrained(path)


def save_models(hub: Path, tokenizer_path: Path) -> None:
    """A cache of the hub in which the tiny models of TRL's tests are stand-ins."""
    import torch
    import transformers as hf

    from tests.support import vision

    leave_out_videos()
    for name in [*TEXT, *VISION]:
        repository = hub / f"models--trl-internal-testing--tiny-{name}"
        folder = repository / "snapshots" / "0"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text("0")
        family, kind = re.split("For[CS]", name)[0], getattr(hf, name.split("-")[0])
        if name in TEXT:
            template, eos, settings = TEXT[name]
            processor = hf.AutoTokenizer.from_pretrained(tokenizer_path, eos_token=eos)
            processor.chat_template = templates()[template]
            pairs = (pair.split("=") for pair in f"{SIZES} {settings}".split())
            config = getattr(hf, f"{family}Config")(
                **{key: json.loads(value) for key, value in pairs},
                vocab_size=len(processor),
                eos_token_id=processor.eos_token_id,
                pad_token_id=processor.pad_token_id,
                bos_token_id=None,
            )
        else:
            tokenizer = vision.make_tokenizer(str(tokenizer_path), VISION[name][0])
            processor = vision.make_processor(tokenizer, VISION[name][0])
            processor.chat_template = templates().get(VISION[name][1], processor.chat_template)
            config = vision.make_model(tokenizer, VISION[name][0]).config
            config.get_text_config().max_position_embeddings = 4096
            config.vision_config.vision_use_head = False  # of Gemma 3: a part that its features never pass through
        torch.manual_seed(0)
        model = kind(config)
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 and not key.endswith("conv1d.weight"):
                parameter.data.normal_(0.0, 0.15)  # far enough from uniform that a mistake shows in the reward
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for file in folder.glob("processor_config.json"):  # its class, which is local to a function
            processor_name = "Qwen3VL" if family.startswith("Qwen3") else family
            file.write_text(file.read_text().replace("WithoutVideos", f"{processor_name}Processor"))


def copy_tests(source: Path, target: Path, tokenizer_path: Path) -> None:
    """TRL's tests, with the token ids that they write out in the vocabulary of the stand-ins."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    text, ids = r"'.*'|\".*\"", r"\[\d+(?:, \d+)*\]"
    row = rf"( *)(?:# ({text})(.*)\n *{ids},?|{ids}, +# ({text})(.*))\n"

    def encode(block: re.Match[str]) -> str:
        lines = []
        for indent, above, after, beside, then in re.findall(row, block.group(0)):
            end = "<|im_end|>" if "eos" in after + then else ""
            lines.append((indent, tokenizer.encode(ast.literal_eval(above or beside) + end)))
        width = max(len(line) for _, line in lines)
        return "".join(f"{indent}{line + [tokenizer.pad_token_id] * (width - len(line))},\n" for indent, line in lines)

    shutil.copytree(source, target / "tests", dirs_exist_ok=True)
    for file in (target / "tests").rglob("test_*.py"):
        code = re.sub(rf" *# [\w(].*\n(?= *# (?:{text}))", "", file.read_text())  # comments between the rows
        code = re.sub(f"(?:{row})+", encode, code)
        for qwen, here in (("151643", "<|endoftext|>"), ("151645", "<|im_end|>"), ("17453, 0", "Done!")):
            code = code.replace(qwen, ", ".join(map(str, tokenizer.encode(here))))
        file.write_text(code)


def main() -> None:
    """Runs the tests and sums up their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, required=True, help="folder `tests` of a clone of TRL")
    parser.add_argument("--mode", nargs="+", choices=MODES, required=True, help="what is substituted")
    parser.add_argument("--files", nargs="+", default=FILES, help="files in that folder")
    parser.add_argument("--results", type=Path, required=True, help="JSON Lines, which the run goes on with")
    parser.add_argument("--work", type=Path, default=Path("trl-suites"), help="folder for stand-ins and copied tests")
    parser.add_argument("-k", default="", help="pytest's expression of the tests to run")
    parser.add_argument("--rows", type=int, default=4, help="rows of a data set; TRL's have 17, which few tests need")
    args = parser.parse_args()
    work, results = args.work.resolve(), args.results.resolve()
    if not (work / "complete").exists():
        save_tokenizer(work / "tokenizer")
        save_models(work / "hub", work / "tokenizer")
        (work / "complete").touch()
    copy_tests(args.tests, work, work / "tokenizer")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(work / "hub"),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TRL_SUITES": json.dumps({"modes": args.mode, "results": str(results), "rows": args.rows}),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "studies.trl_suites_plugin", "-p", "no:cacheprovider"]
    command += ["-W", "ignore", "--tb=short", "-k", args.k, *(f"tests/{name}" for name in args.files)]
    subprocess.run(command, cwd=work, env=environment, check=False)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    lines = [f"{row['test']}: {row['reason'].splitlines()[-1]}" for row in rows if row["outcome"] == "failed"]
    lines.append(", ".join(f"{count} {outcome}" for outcome, count in Counter(row["outcome"] for row in rows).items()))
    furthest = max((row["furthest"] for row in rows), default=0.0)
    lines.append(f"{sum(row['rewards'] for row in rows)} rewards, at most {furthest:.1e} from the oracle")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
