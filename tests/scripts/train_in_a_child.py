"""Runs train_language_model.py's main in a spawned process, with the arguments that the parent has parsed."""

import multiprocessing
import sys

from train_language_model import DataTrainingArguments, ModelArguments, main
from transformers import HfArgumentParser, TrainingArguments


def train(training_args):
    print("in the child:", type(training_args.optim).__name__, training_args.optim, flush=True)
    main()  # parses sys.argv, which is the parent's


if __name__ == "__main__":
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    _, _, training_args = parser.parse_args_into_dataclasses()
    process = multiprocessing.get_context("spawn").Process(target=train, args=(training_args,))
    process.start()
    process.join()
    sys.exit(process.exitcode)
