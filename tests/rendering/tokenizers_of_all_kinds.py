# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of every kind, each trained in milliseconds."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


CORPUS = ["The capital of France is Paris.", "What is 12 + 34? It is 46, or so.\n\nhello world, naïve café 中文"] * 8
SPECIAL = ["<s>", "</s>", "<unk>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPACED = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
NAMES = (
    *("byte-level", "byte-level with prefix space", "llama 2", "wordpiece"),
    *(f"{model} metaspace {scheme}" for model in ("bpe", "unigram") for scheme in ("always", "first", "never")),
)


def byte_level_backend(prefix_space, **settings):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return backend, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False, **settings)


def byte_level(special, eos, template=None):
    """Can write any text. Only EOS has a name; the other special tokens are known as added ones only."""
    backend, trainer = byte_level_backend(False, vocab_size=270 + len(special), special_tokens=list(special))
    backend.train_from_iterator(CORPUS[:1], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def tokenizer_named(name):
    scheme = name.rpartition(" ")[2]
    trainer: trainers.Trainer
    if name.startswith("byte-level"):
        backend, trainer = byte_level_backend(scheme == "space", vocab_size=420, special_tokens=SPECIAL)
    elif name == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=False)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    elif name.startswith("unigram"):
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
        letters = [chr(i) for i in range(32, 127)]
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=letters, show_progress=False
        )
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.decoder = decoders.Sequence(SPACED if scheme == "never" else [*SPACED, decoders.Strip(" ", 1, 0)])
        if name == "llama 2":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
