"""Held-out loss, perplexity, bits a byte and token accuracy of causal language models on a text.

    python eval/causal_lm.py --checkpoint 'out/study/gpt2-small/*' --text wiki.valid.tokens.xz

Every token but the first is predicted once, from all that lies before it in a window that slides over the text.
"""

import argparse
import hashlib
import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints import Checkpoint, find_checkpoints, load_model, load_tokenizer
from eval_error import EvalError
from loss_command import command_parser, kept_or_computed, run_command
from result_files import check_writable, result_path
from run import chosen_devices, positive
from scoring_statistics import finite, ratio_of_sums
from text_files import first_words, read_documents, stem_of, text_hash

LONGEST_DEFAULT = 1024
# Above this part of the logits' spread, a change is more than rounding.
ROUNDING = 0.02


class Window(NamedTuple):
    """Inputs ``tokens[start:end]``, of which the last ``fresh`` predict the tokens that no window before predicts."""

    start: int
    end: int
    fresh: int


def windows(tokens: int, context: int, stride: int) -> list[Window]:
    """Return the windows in which each token of a text but the first is predicted once.

    Args:
        tokens: of the text, at least 2.
        context: inputs of a window, at least 1; the last window may have fewer.
        stride: inputs from one start to the next, in [1, context]. A token after the first window is predicted from
            at least ``context - stride + 1`` tokens.

    Source: https://huggingface.co/docs/transformers/perplexity. Differs: the last input of a window predicts too, so
    that with ``stride == context`` no token is left out.
    """
    found, done = [], 0
    for start in range(0, tokens - 1, stride):
        end = min(start + context, tokens - 1)
        found.append(Window(start, end, end - done))
        done = end
        if end == tokens - 1:
            break
    return found


def batches(found: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    """Yield windows in their order, so many at a time; all of a batch have the same length and fresh tokens."""
    batch: list[Window] = []
    for window in found:
        if batch and (len(batch) == batch_size or shape(batch[0]) != shape(window)):
            yield batch
            batch = []
        batch.append(window)
    yield batch


def shape(window: Window) -> tuple[int, int]:
    """Return the numbers of inputs and of fresh ones."""
    return window.end - window.start, window.fresh


def encode(tokenizer: Any, documents: Sequence[str], name: str) -> Any:
    """Return the (tokens,) ids of a text, its documents joined by the end-of-text token.

    As in training, the tokenizer adds no special token of its own.

    Raises:
        EvalError: if there are fewer than 2 tokens, or several documents and no end-of-text token.
    """
    import torch

    if len(documents) > 1 and tokenizer.eos_token_id is None:
        raise EvalError(f"{name}: its tokenizer has no eos token to join {len(documents)} documents; give one text")
    encoded = tokenizer(list(documents), add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids = list(encoded["input_ids"][0])
    for document in encoded["input_ids"][1:]:
        ids += [tokenizer.eos_token_id, *document]
    if len(ids) < 2:
        raise EvalError(f"--text is {len(ids)} token to the tokenizer of {name}; a loss takes at least 2")
    return torch.tensor(ids)


def window_settings(checkpoint: Checkpoint, context: int | None, stride: int | None) -> tuple[int, int]:
    """Return context and stride in tokens: those asked for, else the model's positions, at most 1,024, and half of it.

    Raises:
        EvalError: if the model has fewer positions, the stride exceeds the context, or there is no configuration.
    """
    from transformers import AutoConfig

    source = checkpoint.base or checkpoint.folder
    try:
        config = AutoConfig.from_pretrained(str(source)).get_text_config(decoder=True)
    except Exception as error:  # transformers' own, of many kinds
        first = str(error).splitlines()[0]
        raise EvalError(f"{source / 'config.json'} is no configuration of a model: {first}") from error
    positions = getattr(config, "max_position_embeddings", None)
    if context is None:
        context = min(LONGEST_DEFAULT, positions or LONGEST_DEFAULT)
    elif positions and context > positions:
        raise EvalError(f"--context {context} is more than the {positions} positions of {checkpoint.name}")
    if stride is not None and stride > context:
        raise EvalError(
            f"--stride {stride} would skip tokens: give at most the context of {checkpoint.name}, {context}"
        )
    return context, stride or max(1, context // 2)


def check_causal(model: Any, tokens: Any, name: str) -> None:
    """Refuse a model that sees the tokens it is to predict, such as BERT, which transformers loads as causal.

    Args:
        model: loaded.
        tokens: (length,) ids, at least 2, on the model's device; the last one is changed in a copy.
        name: for the message.

    Raises:
        EvalError: if another last token changes an earlier prediction.
    """
    changed = tokens.clone()
    changed[-1] = (changed[-1] + 1) % model.get_input_embeddings().num_embeddings
    a, b = (model(input_ids=ids[None], use_cache=False).logits[0, :-1].float() for ids in (tokens, changed))
    if (a - b).abs().max() > ROUNDING * a.std():
        raise EvalError(f"{name} is no causal language model: its predictions depend on the tokens to be predicted")


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    documents: Sequence[str],
    *,
    tokenizer: Path | None,
    context: int,
    stride: int,
    batch_size: int,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """Return loss, perplexity, bits a byte, loss a word, accuracy and counts of a checkpoint on a text.

    Args:
        checkpoint: a causal language model.
        documents: of the text.
        tokenizer: folder of the tokenizer; None for the checkpoint's.
        context: inputs of a window, in tokens.
        stride: inputs from one window's start to the next.
        batch_size: windows in a batch.
        dtype: "auto" or a floating type of torch.
        device: as torch names it.

    Raises:
        EvalError: if the checkpoint is no causal language model with such a tokenizer, or its loss is not finite.
    """
    import torch
    from torch.nn import functional
    from tqdm import tqdm

    loaded = load_tokenizer(checkpoint, tokenizer)
    ids = encode(loaded, documents, checkpoint.name)
    model = load_model(checkpoint, tokens=len(loaded), dtype=dtype, device=device)
    rows = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= rows:
        raise EvalError(
            f"{checkpoint.name}: token {int(ids.max())} of the text, but embeddings of {rows}: not its tokenizer"
        )
    found = windows(len(ids), context, stride)
    can_skip = "logits_to_keep" in inspect.signature(model.forward).parameters
    losses: list[float] = []
    hits: list[int] = []
    with torch.inference_mode(), tqdm(total=len(ids) - 1, unit="token", unit_scale=True, desc=checkpoint.label) as bar:
        check_causal(model, ids[: max(2, min(16, context))].to(device), checkpoint.name)
        for batch in batches(found, batch_size):
            fresh = batch[0].fresh
            inputs = torch.stack([ids[window.start : window.end] for window in batch]).to(device)
            labels = torch.stack([ids[window.end + 1 - fresh : window.end + 1] for window in batch]).to(device)
            options = {"logits_to_keep": fresh} if can_skip else {}
            logits = model(input_ids=inputs, use_cache=False, **options).logits[:, -fresh:]
            # One window at a time: float32 logits of a large vocabulary are the largest tensor here.
            for row, label in zip(logits, labels, strict=True):
                each = functional.cross_entropy(row.float(), label, reduction="none")
                losses.append(each.double().sum().item())
                hits.append(int((row.argmax(-1) == label).sum()))
            bar.update(fresh * len(batch))
    if not math.isfinite(sum(losses)):
        raise EvalError(f"{checkpoint.name}: its loss is not finite in {model.dtype}; try --dtype float32")
    return {
        **summary(losses, hits, [window.fresh for window in found], documents),
        "documents": len(documents),
        "context": context,
        "stride": stride,
        "tokens_hash": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "model_dtype": str(model.dtype).removeprefix("torch."),
    }


def summary(
    losses: Sequence[float], hits: Sequence[int], counts: Sequence[int], documents: Sequence[str]
) -> dict[str, Any]:
    """Return what a result says of a text.

    Args:
        losses: sum of each window's fresh tokens, in nats.
        hits: of these tokens, how many were the most likely ones.
        counts: fresh tokens of each window.
        documents: the text; its bytes and words are all that it has, those of the first token too.
    """
    tokens = sum(counts)
    size = sum(len(document.encode()) for document in documents)
    words = sum(len(document.split()) for document in documents)
    loss, loss_error = ratio_of_sums(losses, counts)
    accuracy, accuracy_error = ratio_of_sums(hits, counts)
    bits = tokens / size / math.log(2)
    return {
        "loss": loss,
        "loss_standard_error": finite(loss_error),
        "perplexity": exponential(loss),
        "bits_per_byte": loss * bits,
        "bits_per_byte_standard_error": finite(loss_error * bits),
        "loss_per_word": loss * tokens / words,
        "word_perplexity": exponential(loss * tokens / words),
        "accuracy": accuracy,
        "accuracy_standard_error": finite(accuracy_error),
        "tokens": tokens,
        "bytes": size,
        "words": words,
        "window_losses": list(losses),
        "window_tokens": list(counts),
    }


def exponential(nats: float) -> float | None:
    """Return e to a power; None where that is no floating-point number (a text with hardly a blank)."""
    try:
        return math.exp(nats)
    except OverflowError:
        return None


def paired_loss(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float] | None:
    """Return the difference of two losses and its standard error over windows; None for other tokens or windows."""
    if any(a[name] != b[name] for name in ("tokens_hash", "window_tokens", "context", "stride")):
        return None
    return ratio_of_sums(
        [x - y for x, y in zip(a["window_losses"], b["window_losses"], strict=True)], a["window_tokens"]
    )


def report(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of results; differences of loss are from the first one's."""
    lines = [
        "| checkpoint | loss (nats a token) | perplexity | bits a byte | word perplexity | accuracy % "
        "| loss minus the first's | tokens | context |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    pairs = [paired_loss(result, results[0]) for result in results]
    for result, pair in zip(results, pairs, strict=True):
        delta = "" if pair is None or result is results[0] else f"{pair[0]:+.4f} ± {pair[1]:.4f}"
        lines.append(
            f"| {result['checkpoint']['label']} | {plus_minus(result, 'loss')} | {shown(result['perplexity'])} "
            f"| {plus_minus(result, 'bits_per_byte')} | {shown(result['word_perplexity'])} "
            f"| {100 * result['accuracy']:.2f} | {delta} | {result['tokens']:,} | {result['context']:,} |"
        )
    first = results[0]
    lines += ["", f"{first['bytes']:,} bytes, {first['words']:,} words. ± is one standard error over windows."]
    if None in pairs:
        lines.append("No difference is given for other tokens or windows than the first's: compare bits a byte.")
    return "\n".join(lines)


def plus_minus(result: dict[str, Any], name: str) -> str:
    """Return a number of a result with its standard error."""
    error = result[f"{name}_standard_error"]
    return f"{result[name]:.4f} ± {math.nan if error is None else error:.4f}"


def shown(perplexity: float | None) -> str:
    """Return a perplexity for the table."""
    return "> 1e308" if perplexity is None else f"{perplexity:,.3f}" if perplexity < 1e9 else f"{perplexity:.3e}"


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; return the exit status."""
    parser = command_parser("causal_lm", __doc__, batched="windows")
    parser.add_argument(
        "--text",
        nargs="+",
        type=Path,
        required=True,
        help="held-out files: .jsonl with a column text, any other suffix is UTF-8 text; also .gz .xz .bz2",
    )
    parser.add_argument("--limit", type=positive, help="the first so many words of the text only")
    parser.add_argument(
        "--context", type=positive, help="tokens a window (the model's positions, <= 1024); small ones cost history"
    )
    parser.add_argument(
        "--stride", type=positive, help="tokens from window to window (half the context); small ones cost time"
    )

    def evaluate_all(arguments: argparse.Namespace) -> str:
        if arguments.context and arguments.stride and arguments.stride > arguments.context:
            raise EvalError(
                f"--stride {arguments.stride} would skip tokens: give at most the context, {arguments.context}"
            )
        documents = [document for path in arguments.text for document in read_documents(path)]
        documents = first_words(documents, arguments.limit)
        check_writable(arguments.output)
        (device,) = chosen_devices(arguments.device, None)
        checkpoints = find_checkpoints(arguments.checkpoint)
        # All before the first model, which may take hours.
        settings = [window_settings(checkpoint, arguments.context, arguments.stride) for checkpoint in checkpoints]
        return report(
            [
                evaluated(checkpoint, documents, arguments, device, context=context, stride=stride)
                for checkpoint, (context, stride) in zip(checkpoints, settings, strict=True)
            ]
        )

    return run_command(parser, argv, evaluate_all)


def evaluated(
    checkpoint: Checkpoint,
    documents: Sequence[str],
    arguments: argparse.Namespace,
    device: str,
    *,
    context: int,
    stride: int,
) -> dict[str, Any]:
    """Return a checkpoint's result: the one that is there if it holds, else a new one, written."""
    key = {
        "checkpoint_hash": checkpoint.digest(arguments.tokenizer),
        "text_hash": text_hash(documents),
        "context": context,
        "stride": stride,
        "dtype": arguments.dtype,
    }
    others = f"-and-{len(arguments.text) - 1}" if len(arguments.text) > 1 else ""
    path = result_path(arguments.output, checkpoint.file_stem, f"causal_lm-{stem_of(arguments.text[0])}{others}")
    about = {
        "text": [file.name for file in arguments.text],
        "limit": arguments.limit,
        "batch_size": arguments.batch_size,
    }

    def compute() -> dict[str, Any]:
        return evaluate_checkpoint(
            checkpoint,
            documents,
            tokenizer=arguments.tokenizer,
            context=context,
            stride=stride,
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            device=device,
        )

    return kept_or_computed(path, key, checkpoint, about, device, compute)


if __name__ == "__main__":
    sys.exit(main())
