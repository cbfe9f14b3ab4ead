"""Prepare text or proteins for training, once: documents to flat files of tokens.

    python recipes/prepare.py --tokenizer gpt2 --dataset_name Skylion007/openwebtext --output_dir data/openwebtext
    python recipes/prepare.py --kind proteins --train_data uniref50.fasta.gz --output_dir data/uniref50
    python recipes/gpt2.py --preset small --train_data data/openwebtext

A recipe prepares what it is given by itself; this is for a corpus prepared on another machine, or to choose its place.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data_sources import KNOWN_CORPORA, data_sources
from document_tokens import load_tokenizer
from preparation import Preparation
from prepared_data import prepare
from recipe_error import RecipeError


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = described.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--train_data",
        nargs="+",
        help="files (.txt .jsonl .json .parquet .csv .fasta, also .gz .xz .bz2), folders or globs",
    )
    source.add_argument("--dataset_name", help=f"a data set on the Hub, such as {', '.join(KNOWN_CORPORA)}")
    described.add_argument("--dataset_config", help="its configuration")
    described.add_argument("--dataset_split", help="its split to train on (default: train)")
    described.add_argument("--text_column", help="the column with the documents (default: text or sequence)")
    described.add_argument("--validation_data", nargs="+", help="files held out, instead of --validation_fraction")
    described.add_argument(
        "--validation_fraction",
        type=float,
        default=0.0005,
        help="part of the documents held out by a hash of each, 0 for none (default: %(default)s)",
    )
    described.add_argument("--kind", choices=("text", "proteins"), default="text")
    described.add_argument("--tokenizer", help="folder or Hub name of the tokenizer of text")
    described.add_argument("--max_tokens", type=float, help="prepare only so many training tokens, such as 1e9")
    described.add_argument("--workers", type=int, default=1, help="processes that tokenize (default: %(default)s)")
    described.add_argument("--output_dir", type=Path, required=True, help="folder to write; it must not exist")
    return described


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        if not 0 <= arguments.validation_fraction < 1:
            raise RecipeError(f"--validation_fraction is {arguments.validation_fraction}; it must be in [0, 1)")
        for flag, value in (("--max_tokens", arguments.max_tokens), ("--workers", arguments.workers)):
            if value is not None and not 1 <= value < float("inf"):
                raise RecipeError(f"{flag} is {value}; it must be at least 1 and finite")
        if arguments.kind == "proteins" and arguments.tokenizer is not None:
            raise RecipeError("--tokenizer: proteins are read with ESM-2's own vocabulary; leave the flag out")
        if arguments.kind == "text" and arguments.tokenizer is None:
            raise RecipeError("no tokenizer: give --tokenizer")
        train, validation = data_sources(
            arguments.kind,
            train_data=arguments.train_data,
            validation_data=arguments.validation_data,
            dataset_name=arguments.dataset_name,
            dataset_config=arguments.dataset_config,
            dataset_split=arguments.dataset_split,
            column=arguments.text_column,
        )
        for source in (train, validation):
            if source is not None and source.holds_tokens:
                raise RecipeError(f"{source.files[0]} holds tokens already: a recipe reads it as it is")
        preparation = Preparation(
            arguments.kind,
            train,
            validation,
            load_tokenizer(arguments.tokenizer) if arguments.kind == "text" else None,
            arguments.validation_fraction if validation is None else 0.0,
            None if arguments.max_tokens is None else int(arguments.max_tokens),
        )
        prepared = prepare(preparation, workers=arguments.workers, output_dir=arguments.output_dir)
    except RecipeError as error:
        print("error:", *str(error).split(), file=sys.stderr)  # on one line
        return 2
    print(json.dumps({side: prepared.meta[side] for side in ("train", "validation")}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
