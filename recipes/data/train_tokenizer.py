"""Train the small byte-level BPE tokenizer of the text sample.

    python recipes/data/train_tokenizer.py [--text recipes/data/novels/train] [--output recipes/data/tokenizer]

The tokenizer has the form of Qwen2.5's (NFC, Qwen's pre-tokenizer, byte-level BPE, ``<|endoftext|>`` between
documents) with its own vocabulary and merges. So ``AutoTokenizer`` gives the same ids whether it goes by the
tokenizer's files or by the model type of a checkpoint beside them. Word 0 is ``<|endoftext|>``; any text has ids.
"""

import argparse
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(files: list[Path], vocab_size: int) -> Qwen2Tokenizer:
    """Learn a vocabulary of ``vocab_size`` words (the end of text and the 256 bytes among them) from text files."""
    untrained = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer = untrained.normalizer
    learner.pre_tokenizer = untrained.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train([str(file) for file in files], trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return Qwen2Tokenizer(vocab=learned["vocab"], merges=merges, bos_token=END_OF_TEXT)


def main() -> int:
    data = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=data / "novels" / "train", help="folder of .txt files")
    parser.add_argument("--output", type=Path, default=data / "tokenizer")
    parser.add_argument("--vocab_size", type=int, default=2048)
    arguments = parser.parse_args()
    files = sorted(arguments.text.glob("*.txt"))
    if not files:
        parser.error(f"no .txt files in {arguments.text}")
    if arguments.vocab_size < 257:
        parser.error(f"--vocab_size is {arguments.vocab_size}; it must be at least 257 (256 bytes and {END_OF_TEXT})")
    tokenizer = train_tokenizer(files, arguments.vocab_size)
    tokenizer.save_pretrained(arguments.output)
    print(f"{len(tokenizer)} words from {len(files)} files in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
