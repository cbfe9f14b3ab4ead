"""Trains a tiny language model on the bytes of a text file; written as transformers' example scripts are."""

import logging
import sys
from dataclasses import dataclass, field

import torch
import transformers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    hidden_size: int = field(default=16, metadata={"help": "Width of the model."})


@dataclass
class DataTrainingArguments:
    train_file: str = field(metadata={"help": "The text to train on."})
    block_size: int = field(default=32, metadata={"help": "Bytes in a training example."})


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    logging.basicConfig(level=logging.INFO, handlers=[logging.StreamHandler(sys.stdout)])
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    logger.warning("rank %s of %s", training_args.process_index, training_args.world_size)
    set_seed(training_args.seed)

    with open(data_args.train_file, "rb") as file:
        tokens = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()
    blocks = tokens[: len(tokens) // data_args.block_size * data_args.block_size].view(-1, data_args.block_size)
    train_dataset = [{"input_ids": block, "labels": block} for block in blocks]

    config = GPT2Config(
        vocab_size=256,
        n_positions=data_args.block_size,
        n_embd=model_args.hidden_size,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=training_args,
        train_dataset=train_dataset,
        data_collator=default_data_collator,
    )
    train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", train_result.metrics)
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_state()
    return trainer


if __name__ == "__main__":
    trainer = main()
