"""MBPP scored by running each program with its tests, one process a program; see ``code_runner``."""

from typing import Any

from code_runner import run_programs

SHOTS = (2, 3, 4)  # task ids of the solved examples, as in the paper of MBPP


def shots(dataset: Any) -> Any:
    """Keep the three solved examples, in the order of their ids."""
    places = {task_id: place for place, task_id in enumerate(dataset["task_id"])}
    return dataset.select([places[task_id] for task_id in SHOTS])


def run_all(responses: list[list[str]], docs: list[dict[str, Any]]) -> list[float]:
    """Return 1.0 for each document whose program passes its tests, else 0.0."""
    programs = [program(answers[0], doc) for answers, doc in zip(responses, docs, strict=True)]
    return [float(outcome.passed) for outcome in run_programs(programs)]


def program(answer: str, doc: dict[str, Any]) -> str:
    """Join an answer, the set-up of the tests, which may use its classes, and the tests."""
    return "\n".join([answer, doc["test_setup_code"] or "", *doc["test_list"]])


def process_results(doc: dict[str, Any], results: list[float]) -> dict[str, float]:
    """Return the outcome that ``run_all`` found."""
    return {"pass_at_1": results[0]}
