"""A model that is loaded already, as lm-evaluation-harness sees it."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from lm_eval.models.huggingface import HFLM


class LoadedLM(HFLM):  # type: ignore[misc]
    """The harness' Hugging Face model around a model and tokenizer that are loaded already.

    The harness tokenizes one text at a time, on one core, and a question's prompt once for every answer. Here a text
    that ``remember`` was given is tokenized once, with others at the same time; the tokens are the same.

    Args:
        model: a causal language model or a PeftModel, on its device.
        tokenizer: its tokenizer; a padding token is added to it if it has none.
        batch_size: sequences in a batch.
        max_length: context, in tokens; None for the model's own.

    Attributes:
        answers_cut: answers scored that are longer than the context by themselves; scored by their last tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int, max_length: int | None = None) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        self.answers_cut = 0
        self._tokens: dict[str, np.ndarray] = {}

    def begin(self) -> None:
        """Forget what the last benchmark left: its texts and counts."""
        self.answers_cut = 0
        self._tokens = {}

    def remember(self, texts: Iterable[str]) -> None:
        """Tokenize texts together, on all cores; ``tok_encode`` then answers from memory (4 bytes a token)."""
        # The harness adds no BOS to a text that begins with one; those few are left to it.
        bos = self.tokenizer.decode(self.prefix_token_id)
        new = [
            text for text in dict.fromkeys(texts) if text not in self._tokens and not (bos and text.startswith(bos))
        ]
        if new:
            special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
            rows = self.tokenizer(new, return_attention_mask=False, **special)["input_ids"]
            self._tokens.update((text, np.array(row, dtype=np.int32)) for text, row in zip(new, rows, strict=True))

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Return a text's tokens; arguments as in the harness."""
        if not args and not kwargs and string in self._tokens:
            known: list[int] = self._tokens[string].tolist()
            return known
        encoded: list[int] = super().tok_encode(string, *args, **kwargs)
        return encoded

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each answer, as the harness does."""
        pairs = [request.args for request in requests]
        self.remember(context.rstrip() for context, _ in pairs if context.strip())
        self.remember(context + answer for context, answer in pairs if context)
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return scored

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        longest = self.max_length
        self.answers_cut += sum(len(answer) > longest for _, _, answer in requests)
        return super()._loglikelihood_tokens(
            [(texts, context, answer[-longest:]) for texts, context, answer in requests], *args, **kwargs
        )
