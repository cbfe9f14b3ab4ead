"""The fifteen benchmarks of AdaMuon's second paper, as lm-evaluation-harness runs them."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from eval_error import EvalError


@dataclass(frozen=True)
class Benchmark:
    """One column of the suite.

    Attributes:
        name: as typed on the command line and in file names.
        title: as printed.
        task: task or group of lm-evaluation-harness.
        folder: folder of its YAML files, below ``lm_eval/tasks`` or, if ``own``, below ``tasks`` here.
        shots: solved examples in the prompt.
        metric: ``metric,filter`` that is reported.
        chance: mean score of guessing uniformly among a question's options; 0 for free answers.
        documents: number of questions that are scored in the published split.
        own: the task is defined here; lm-evaluation-harness has none, or one that does not work.
        runs_code: scoring runs programs that the model wrote.
        private: the authors ask that no question be published in plain text.
    """

    name: str
    title: str
    task: str
    folder: str
    shots: int
    metric: str
    chance: float
    documents: int
    own: bool = False
    runs_code: bool = False
    private: bool = False


SUITE = (
    Benchmark("mmlu", "MMLU", "mmlu", "mmlu/default", 5, "acc,none", 0.25, 14042),
    # 3 to 10 options: the mean of 1 / options over the test split
    Benchmark("mmlu_pro", "MMLU-Pro", "mmlu_pro", "mmlu_pro", 5, "exact_match,custom-extract", 0.11, 12032),
    Benchmark("triviaqa", "TriviaQA", "triviaqa", "triviaqa", 5, "exact_match,remove_whitespace", 0.0, 17944),
    Benchmark("arc_challenge", "ARC-C", "arc_challenge", "arc", 25, "acc_norm,none", 0.25, 1172),
    Benchmark("gpqa", "GPQA", "gpqa_diamond_fixed_order", "gpqa", 5, "acc,none", 0.25, 198, own=True, private=True),
    Benchmark("openbookqa", "OpenBookQA", "openbookqa", "openbookqa", 5, "acc_norm,none", 0.25, 500),
    Benchmark("hellaswag", "HellaSwag", "hellaswag", "hellaswag", 10, "acc_norm,none", 0.25, 10042),
    Benchmark("winogrande", "WinoGrande", "winogrande", "winogrande", 5, "acc,none", 0.5, 1267),
    Benchmark("piqa", "PIQA", "piqa", "piqa", 5, "acc_norm,none", 0.5, 1838),
    Benchmark("commonsense_qa", "CommonsenseQA", "commonsense_qa", "commonsense_qa", 7, "acc,none", 0.2, 1221),
    Benchmark("chid", "CHID", "chid_fewclue", "chid", 5, "acc,none", 1 / 7, 2002, own=True),
    Benchmark("cmmlu", "CMMLU", "cmmlu", "cmmlu", 5, "acc,none", 0.25, 11582),
    Benchmark("ceval", "C-Eval", "ceval-valid", "ceval", 5, "acc,none", 0.25, 1346),
    Benchmark("mbpp", "MBPP", "mbpp_limited", "mbpp", 3, "pass_at_1,none", 0.0, 500, own=True, runs_code=True),
    Benchmark("gsm8k", "GSM8K", "gsm8k", "gsm8k", 4, "exact_match,flexible-extract", 0.0, 1319),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in SUITE}


def select(names: Sequence[str], skip: Sequence[str] = ()) -> list[Benchmark]:
    """Return the named benchmarks in the suite's order; ``all`` names every one, and commas may separate names.

    Raises:
        EvalError: for an unknown name, or if nothing is left.
    """
    names, skip = ([part for name in some for part in name.split(",") if part] for some in (names, skip))
    for name in (*names, *skip):
        if name not in BENCHMARKS and name != "all":
            near = difflib.get_close_matches(name, BENCHMARKS, n=1)
            hint = f"did you mean {near[0]}?" if near else "there are: " + ", ".join(BENCHMARKS)
            raise EvalError(f"there is no benchmark {name!r}; {hint}")
    wanted = {*BENCHMARKS} if "all" in names else {*names}
    chosen = [benchmark for benchmark in SUITE if benchmark.name in wanted and benchmark.name not in skip]
    if not chosen:
        raise EvalError("no benchmark is left: name some in --tasks that --skip does not")
    return chosen
