"""Invented rows in the real schemas of the fifteen benchmarks, models that know the answers, and a tiny checkpoint.

A right answer contains RIGHT; every question contains FRAGE once, with the name of its split; so a test can see from a
prompt alone what it holds.
"""

import csv
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import tokenizers
import transformers
from lm_eval.api.model import LM
from offline_data import Need
from suite import SUITE
from task_loading import needs

_KEPT: list[Any] = []
RIGHT = "richtig"
EVAL_ROWS = 2
SHOT_ROWS = {"allenai/ai2_arc": 26, "Rowan/hellaswag": 12, "tau/commonsense_qa": 8}
MMLU_PRO_SUBJECTS = [
    *("biology", "business", "chemistry", "computer science", "economics", "engineering", "health"),
    *("history", "law", "math", "other", "philosophy", "physics", "psychology"),
]


def options(number: int, count: int) -> tuple[list[str], int]:
    """Return ``count`` options, one of them right, and its index."""
    key = number % count
    return [RIGHT + str(number) if index == key else f"falsch {index} von {number}" for index in range(count)], key


def row(dataset: str, split: str, number: int) -> dict[str, Any]:
    """Return an invented row of a data set, with the columns of the real one."""
    question = f"FRAGE-{split} {dataset} {number}"
    two, four, five, seven, ten = (options(number, count) for count in (2, 4, 5, 7, 10))
    if dataset == "cais/mmlu":
        return {"question": question, "subject": "s", "choices": four[0], "answer": four[1]}
    if dataset == "TIGER-Lab/MMLU-Pro":
        letter = "ABCDEFGHIJ"[ten[1]]
        return {
            "question_id": number,
            "question": question,
            "options": ten[0],
            "answer": letter,
            "answer_index": ten[1],
            "cot_content": f"A: Let's think step by step. So the answer is ({letter}).",
            "category": MMLU_PRO_SUBJECTS[number % 14],
            "src": "invented",
        }
    if dataset == "mandarjoshi/trivia_qa":
        answer = {"aliases": [f"{RIGHT}{number}", f"{RIGHT} {number}"], "value": f"{RIGHT}{number}"}
        return {"question": f"{question} ({RIGHT}{number})", "question_id": str(number), "answer": answer}
    if dataset == "allenai/ai2_arc":
        choices = {"text": four[0], "label": ["A", "B", "C", "D"]}
        return {"id": str(number), "question": question, "choices": choices, "answerKey": "ABCD"[four[1]]}
    if dataset == "Idavidrein/gpqa":
        wrong = {f"Incorrect Answer {index}": f"falsch {index} von {number}" for index in (1, 2, 3)}
        return {"Record ID": str(number), "Question": question, "Correct Answer": f"{RIGHT}{number}", **wrong}
    if dataset == "allenai/openbookqa":
        choices = {"text": four[0], "label": ["A", "B", "C", "D"]}
        return {"id": str(number), "question_stem": question, "choices": choices, "answerKey": "ABCD"[four[1]]}
    if dataset == "Rowan/hellaswag":
        return {
            "ind": number,
            "activity_label": "Etwas",
            "ctx_a": question,
            "ctx_b": "",
            "ctx": question,
            "endings": four[0],
            "label": str(four[1]),
        }
    if dataset == "allenai/winogrande":
        sentence = f"{question}: _ stands here."
        return {"sentence": sentence, "option1": two[0][0], "option2": two[0][1], "answer": str(two[1] + 1)}
    if dataset == "baber/piqa":
        return {"goal": question, "sol1": two[0][0], "sol2": two[0][1], "label": two[1]}
    if dataset == "tau/commonsense_qa":
        choices = {"label": list("ABCDE"), "text": five[0]}
        return {"id": str(number), "question": question, "choices": choices, "answerKey": "ABCDE"[five[1]]}
    if dataset == "clue/fewclue_chid":
        return {"id": number, "candidates": seven[0], "content": f"{question} \"'#idiom#'\"", "answer": seven[1]}
    if dataset == "haonan-li/cmmlu":
        return {"Question": question, **dict(zip("ABCD", four[0], strict=True)), "Answer": "ABCD"[four[1]]}
    if dataset == "ceval/ceval-exam":
        named = dict(zip("ABCD", four[0], strict=True))
        return {"id": number, "question": question, **named, "answer": "ABCD"[four[1]], "explanation": ""}
    if dataset == "google-research-datasets/mbpp":
        return {
            "task_id": number + 1,
            "text": f"{question}: multiply by {number}.",
            "code": f"def times_{number}(x):\r\n    return {number} * x",
            "test_list": [f"assert times_{number}({x}) == {number * x}" for x in (1, 2, 5)],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
    if dataset == "openai/gsm8k":
        return {"question": f"{question}: what is {RIGHT}{number + 10}?", "answer": f"It is.\n#### {number + 10}"}
    raise AssertionError(dataset)


def row_count(need: Need, split: str) -> int:
    """Return the number of invented rows of a split."""
    if need.dataset == "TIGER-Lab/MMLU-Pro":
        return 14 * (EVAL_ROWS if split == "test" else 5)
    if need.dataset == "Idavidrein/gpqa":
        return 8
    if split == need.splits[0]:
        return EVAL_ROWS
    return SHOT_ROWS.get(need.dataset, 7)


@cache
def shared_data() -> Path:
    """Return a folder with the rows of all benchmarks, the same for all tests of a process; not to be changed."""
    folder = TemporaryDirectory(prefix="eval-data-")
    _KEPT.append(folder)  # removed when the process ends
    return write_data(Path(folder.name))


def write_data(folder: Path) -> Path:
    """Write the rows of all fifteen benchmarks, in each of the three layouts and four formats."""
    for need in {need for benchmark in SUITE for need in needs(benchmark)}:
        place = folder / need.dataset / (need.config or "default")
        place.mkdir(parents=True)
        for split in need.splits:
            rows = [row(need.dataset, split, number) for number in range(row_count(need, split))]
            if need.dataset == "Idavidrein/gpqa":
                with (place / f"{split}.csv").open("w", newline="") as stream:
                    writer = csv.DictWriter(stream, rows[0])
                    writer.writeheader()
                    writer.writerows(rows)
            elif need.dataset == "Rowan/hellaswag":
                half = len(rows) // 2
                for part, some in enumerate((rows[:half], rows[half:])):
                    path = place / f"{split}-0000{part}-of-00002.parquet"
                    datasets.Dataset.from_list(some).to_parquet(str(path))
            elif need.dataset == "baber/piqa":  # a snapshot: its README says where the files are
                datasets.Dataset.from_list(rows).to_parquet(str(folder / need.dataset / f"only-{split}.parquet"))
            else:
                lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows)
                (place / f"{split}.jsonl").write_text(lines)
    (folder / "baber/piqa/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: only-train.parquet\n"
        "  - split: validation\n    path: only-validation*\n---\n# A snapshot\n"
    )
    return folder


class PromptReader(LM):
    """A model that answers from the prompt it sees, and keeps what it saw.

    Args:
        right: answer every question rightly, or every one wrongly.
    """

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right
        self.prompts: list[str] = []
        self.whole: list[str] = []

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answers = []
        for request in requests:
            prompt, answer = request.args
            self.prompts.append(prompt)
            self.whole.append(prompt + answer)
            if letter := re.fullmatch(r" ?\(?([A-J])\)?", answer):
                is_right = letter[1] == right_letter(prompt)
            else:
                is_right = RIGHT in answer or RIGHT in prompt.split("\n\n")[-1]
            answers.append((0.0 if is_right == self.right else -1e6, is_right))
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers = []
        for request in requests:
            prompt = request.args[0]
            self.prompts.append(prompt)
            self.whole.append(prompt)
            answers.append(self.generated(prompt))
        return answers

    def generated(self, prompt: str) -> str:
        if prompt.endswith("Let's think step by step."):
            letter = right_letter(prompt)
            return f" So the answer is ({letter if self.right else 'ABCDEFGHIJ'['ABCDEFGHIJ'.index(letter) - 1]})."
        if prompt.endswith("[BEGIN]\n"):
            number = re.findall(r"assert times_(\d+)\(1\)", prompt)[-1]
            return f"def times_{number}(x):\n    return {number if self.right else '-1 -'} * x"
        number = re.findall(rf"{RIGHT}(\d+)", prompt)[-1]
        if "what is" in prompt.rsplit("FRAGE", 1)[1]:
            return f" We think.\n#### {int(number) + (not self.right)}"
        return f" {RIGHT}{number if self.right else 'x'}"

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise AssertionError("no benchmark asks for this")


def right_letter(prompt: str) -> str:
    """Return the letter of the right option of a prompt's last question."""
    return re.findall(rf"^\(?([A-J])[.)] {RIGHT}", prompt, flags=re.MULTILINE)[-1]


class Scripted(PromptReader):
    """A model whose generated answers are given: a function of the prompt."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__(right=True)
        self.generated = answer  # type: ignore[method-assign]


def save_tokenizer(folder: Path, *, context: int = 512) -> Any:
    """Save a tokenizer of bytes, cut at spaces: one that Qwen's pre-tokenizer would read otherwise."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {character: index for index, character in enumerate(["<pad>", "<bos>", "<eos>", *sorted(alphabet)])}
    vocabulary["12"] = len(vocabulary)  # digits in pairs: Qwen's pre-tokenizer would cut between them
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("1", "2")]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=context
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_checkpoint(folder: Path, *, seed: int = 0, context: int = 512, dropout: float = 0.0) -> Path:
    """Save a Qwen2 model of a few thousand random weights, with its tokenizer."""
    tokenizer = save_tokenizer(folder, context=context)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        attention_dropout=dropout,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.5,
    )
    transformers.set_seed(seed)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder
