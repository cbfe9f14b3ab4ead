"""Held-out loss, perplexity and token accuracy of masked language models, such as ESM-2, on proteins in a FASTA file.

    python eval/masked_lm.py --checkpoint 'out/esm2-*' --fasta validation.fasta.gz

The masked positions depend on the sequence and the seed alone, so every checkpoint predicts the same residues.
"""

import argparse
import gzip
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint, find_checkpoints, load_model, load_tokenizer
from eval_error import EvalError
from loss_command import command_parser, kept_or_computed, run_command
from offline_data import file_digest
from result_files import check_writable, result_path
from run import chosen_devices, positive
from scoring_statistics import finite, ratio_of_sums


def read_fasta(path: Path) -> list[tuple[str, str]]:
    """Return (name, sequence) of each entry; sequences in capitals.

    Raises:
        EvalError: for a file that is no FASTA, an entry without residues, or a character that stands for none.
    """
    entries: list[tuple[str, list[str]]] = []
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
            for number, line in enumerate(map(str.strip, stream), 1):
                if line.startswith(">"):
                    entries.append(((line[1:].split() or [f"line {number}"])[0], []))
                elif line and not entries:
                    raise EvalError(f"--fasta {path}: line {number} comes before any '>' line; it is no FASTA file")
                elif line:
                    residues = line.rstrip("*").upper()
                    if not residues.replace("-", "").isalpha() or not residues.isascii():
                        raise EvalError(f"--fasta {path}: line {number} has a character that is no residue: {line!r}")
                    entries[-1][1].append(residues)
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"--fasta {path} cannot be read: {error}") from error
    if not entries:
        raise EvalError(f"--fasta {path} holds no sequence")
    joined = [(name, "".join(parts)) for name, parts in entries]
    if empty := [name for name, sequence in joined if not sequence]:
        raise EvalError(f"--fasta {path}: {empty[0]} has no residues")
    return joined


def mask(tokens: Any, tokenizer: Any, *, rate: float, seed: int) -> tuple[Any, Any]:
    """Mask a sequence as in training: of the chosen positions 80 % masked, 10 % another token, 10 % as they are.

    Args:
        tokens: (length,) ids, special tokens at the ends included.
        tokenizer: of the model.
        rate: part of the positions to choose.
        seed: another one chooses other positions.

    Returns:
        (length,) inputs and (length,) labels, -100 where nothing is predicted.
    """
    import torch
    from transformers import DataCollatorForLanguageModeling

    digest = hashlib.sha256(tokens.numpy().tobytes() + seed.to_bytes(8, "little")).digest()
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=rate)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:7], "little"))
        inputs, labels = collator.torch_mask_tokens(tokens.clone()[None])
    return inputs[0], labels[0]


def metric() -> Any:
    """Return an ``evaluate`` metric of masked tokens: loss (nats a token), perplexity, accuracy.

    ``evaluate.load`` of a ready-made one would fetch its code from the Hub.
    """
    import datasets
    import evaluate
    import numpy as np

    class MaskedTokens(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> Any:
            return evaluate.MetricInfo(
                description="Loss, perplexity and accuracy of masked tokens.",
                citation="",
                features=datasets.Features(
                    {
                        "predictions": datasets.Value("int32"),
                        "references": datasets.Value("int32"),
                        "losses": datasets.Value("float32"),
                        "sequences": datasets.Value("int32"),
                    }
                ),
            )

        def _compute(self, predictions: Any, references: Any, losses: Any, sequences: Any) -> dict[str, Any]:
            order = np.asarray(sequences)
            losses, hits = np.asarray(losses, np.float64), np.asarray(predictions) == np.asarray(references)
            sums, counts = np.bincount(order, losses).tolist(), np.bincount(order).tolist()
            loss, loss_error = ratio_of_sums(sums, counts)
            accuracy, accuracy_error = ratio_of_sums(np.bincount(order, hits).tolist(), counts)
            return {
                "loss": loss,
                "loss_standard_error": finite(loss_error),
                "perplexity": math.exp(loss),
                "accuracy": accuracy,
                "accuracy_standard_error": finite(accuracy_error),
                "masked_tokens": len(losses),
                "sequence_losses": sums,
                "sequence_masked_tokens": counts,
            }

    return MaskedTokens(keep_in_memory=True)


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield indices, the longest sequences first, so that a batch is padded little and memory runs out early."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    entries: Sequence[tuple[str, str]],
    *,
    rate: float,
    seed: int,
    max_length: int | None,
    batch_size: int,
    dtype: str,
    device: str,
    tokenizer_folder: Path | None = None,
) -> dict[str, Any]:
    """Return loss, perplexity, accuracy and counts of a checkpoint on proteins.

    Args:
        checkpoint: a masked language model.
        entries: (name, sequence).
        rate: part of the residues that is predicted.
        seed: of the choice of residues.
        max_length: longest input in tokens, special ones included; longer proteins are cut at their end. None for
            the model's own, at most 1,024.
        batch_size: proteins in a batch.
        dtype: "auto" or a floating type of torch.
        device: as torch names it.
        tokenizer_folder: folder of the tokenizer; None for the checkpoint's.

    Raises:
        EvalError: if the checkpoint holds no masked language model.
    """
    import torch
    from torch.nn import functional
    from tqdm import tqdm

    tokenizer = load_tokenizer(checkpoint, tokenizer_folder)
    if tokenizer.mask_token_id is None:
        raise EvalError(f"{checkpoint.name}: its tokenizer has no mask token, so it is no masked language model")
    model = load_model(checkpoint, tokens=len(tokenizer), dtype=dtype, device=device, kind="masked")
    longest = max_length or min(1024, getattr(model.config, "max_position_embeddings", 1024) or 1024)
    encoded = [torch.tensor(tokenizer(text)["input_ids"]) for _, text in entries]
    cut = sum(len(tokens) > longest for tokens in encoded)
    # The last token closes the sequence; a cut protein has no end.
    encoded = [tokens[:longest] for tokens in encoded]
    measure = metric()
    predicted = 0
    with torch.inference_mode(), tqdm(total=len(encoded), unit="protein", desc=checkpoint.label) as bar:
        for indices in batches([len(tokens) for tokens in encoded], batch_size):
            masked = [mask(encoded[index], tokenizer, rate=rate, seed=seed) for index in indices]
            inputs = torch.nn.utils.rnn.pad_sequence([x for x, _ in masked], True, tokenizer.pad_token_id).to(device)
            labels = torch.nn.utils.rnn.pad_sequence([y for _, y in masked], True, -100).to(device)
            attention = torch.zeros_like(inputs)
            for row, (x, _) in enumerate(masked):
                attention[row, : len(x)] = 1
            chosen = labels != -100
            logits = model(input_ids=inputs, attention_mask=attention).logits[chosen].float()
            predicted += len(logits)
            if len(logits):
                losses = functional.cross_entropy(logits, labels[chosen], reduction="none")
                rows = torch.tensor(indices)[chosen.nonzero()[:, 0].cpu()]
                measure.add_batch(
                    predictions=logits.argmax(-1).tolist(),
                    references=labels[chosen].tolist(),
                    losses=losses.tolist(),
                    sequences=rows.tolist(),
                )
            bar.update(len(indices))
    if not predicted:
        raise EvalError(f"no residue of {len(encoded)} proteins was chosen at --mask-rate {rate}: give a larger one")
    computed = measure.compute()
    unknown = sum(int((tokens == tokenizer.unk_token_id).sum()) for tokens in encoded)
    return {
        **computed,
        "proteins": len(encoded),
        "proteins_cut": cut,
        "unknown_tokens": unknown,
        "max_length": longest,
        "model_dtype": str(model.dtype).removeprefix("torch."),
    }


def paired_loss(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float]:
    """Return the difference of two losses on the same masked residues and its standard error over proteins."""
    differences = [x - y for x, y in zip(a["sequence_losses"], b["sequence_losses"], strict=True)]
    return ratio_of_sums(differences, a["sequence_masked_tokens"])


def report(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of results; differences of loss are from the first one's."""
    lines = [
        "| checkpoint | loss (nats) | perplexity | accuracy % | loss minus the first's | masked residues |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        difference, error = paired_loss(result, results[0])
        delta = "" if result is results[0] else f"{difference:+.4f} ± {error:.4f}"
        lines.append(
            f"| {result['checkpoint']['label']} "
            f"| {result['loss']:.4f} ± {result['loss_standard_error'] or math.nan:.4f} "
            f"| {result['perplexity']:.3f} | {100 * result['accuracy']:.2f} | {delta} | {result['masked_tokens']:,} |"
        )
    return "\n".join([*lines, "", "± is one standard error over proteins; differences are paired."])


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; return the exit status."""
    parser = command_parser("masked_lm", __doc__, batched="proteins")
    parser.add_argument("--fasta", type=Path, required=True, help="held-out proteins, also .gz")
    parser.add_argument("--limit", type=positive, help="the first so many proteins only")
    parser.add_argument("--mask-rate", type=float, default=0.15, help="part of the residues to predict (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of residues (%(default)s)")
    parser.add_argument(
        "--max-length", type=positive, help="in tokens; longer proteins are cut (the model's, <= 1024)"
    )

    def evaluate_all(arguments: argparse.Namespace) -> str:
        if not 0 < arguments.mask_rate <= 1:
            raise EvalError(f"--mask-rate {arguments.mask_rate} is not in (0, 1]")
        if not 0 <= arguments.seed < 2**64:
            raise EvalError(f"--seed {arguments.seed} is not in [0, 2^64)")
        if arguments.max_length is not None and arguments.max_length < 3:
            raise EvalError(f"--max-length {arguments.max_length} has no room for a residue: give at least 3")
        entries = read_fasta(arguments.fasta)[: arguments.limit]
        check_writable(arguments.output)
        (device,) = chosen_devices(arguments.device, None)
        checkpoints = find_checkpoints(arguments.checkpoint)
        return report([evaluated(checkpoint, entries, arguments, device) for checkpoint in checkpoints])

    return run_command(parser, argv, evaluate_all)


def evaluated(
    checkpoint: Checkpoint, entries: Sequence[tuple[str, str]], arguments: argparse.Namespace, device: str
) -> dict[str, Any]:
    """Return a checkpoint's result: the one that is there if it holds, else a new one, written."""
    options = {name: getattr(arguments, name) for name in ("seed", "max_length", "dtype")}
    key = {
        "checkpoint_hash": checkpoint.digest(arguments.tokenizer),
        "fasta_hash": file_digest(arguments.fasta),
        "limit": arguments.limit,
        "mask_rate": arguments.mask_rate,
        **options,
    }
    path = result_path(arguments.output, checkpoint.file_stem, f"masked_lm-{arguments.fasta.name.split('.')[0]}")
    about = {"fasta": arguments.fasta.name, "batch_size": arguments.batch_size}

    def compute() -> dict[str, Any]:
        return evaluate_checkpoint(
            checkpoint,
            entries,
            rate=arguments.mask_rate,
            batch_size=arguments.batch_size,
            device=device,
            tokenizer_folder=arguments.tokenizer,
            **options,
        )

    return kept_or_computed(path, key, checkpoint, about, device, compute)


if __name__ == "__main__":
    sys.exit(main())
