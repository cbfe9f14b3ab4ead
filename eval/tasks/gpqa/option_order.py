"""GPQA with the options of a question always in the same order.

The harness' own task draws a new order each time it reads the questions; the prompt and the key come from different
reads, and a model that is always right scores 0.30.
"""

import hashlib
from random import Random
from typing import Any

WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def process_docs(dataset: Any) -> Any:
    """Keep the question and add ``choices`` (four texts) and ``answer`` (the index of the right one)."""

    def in_order(doc: dict[str, Any]) -> dict[str, Any]:
        texts = [" ".join((doc[field] or "").split()) for field in ("Correct Answer", *WRONG)]
        order = [0, 1, 2, 3]
        Random(hashlib.sha256(doc["Question"].encode()).hexdigest()).shuffle(order)
        return {"choices": [texts[index] for index in order], "answer": order.index(0)}

    return dataset.map(in_order, remove_columns=[name for name in dataset.column_names if name != "Question"])
