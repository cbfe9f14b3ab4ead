"""CHID as a question of fluency: which of seven idioms makes the passage a likely text?"""

from typing import Any

VERDICT = "\n这个句子是通顺的。"


def process_docs(dataset: Any) -> Any:
    """Add ``choices``: the passage with each candidate in the blank, and the verdict that it reads well.

    Not in Jinja: lm-evaluation-harness passes a template's output through ``literal_eval``, which quotes would break.
    """

    def with_choices(doc: dict[str, Any]) -> dict[str, Any]:
        return {"choices": [doc["content"].replace("#idiom#", idiom) + VERDICT for idiom in doc["candidates"]]}

    return dataset.map(with_choices)
