"""Trainer on gloo processes, by every engine that runs on CPUs: equal to one process, resumed on 1, 2 and 3 ranks.

And a rank that dies: the other ends with an error, and the run goes on from its last checkpoint. The cases are in
``engine_cases.py``.
"""

import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_cases import RUNS, RUNS_OF_FOUR, cases, result_path
from engines import assert_close_results, initial_weights, result_of, train, trainer_of
from gloo_ranks import run_cases
from killed_rank import TIMEOUT_SECONDS

#: Engine, rank that dies, signal. Rank 0 keeps the store by which ranks find each other.
DEATHS = [("ddp", 1, "SIGKILL"), ("fsdp2", 0, "SIGKILL"), ("fsdp2_sharded", 1, "SIGSTOP")]


def run_with_a_death(folder: Path, engine: str, dying: int, signal_name: str) -> tuple[int, float, str]:
    """Train on two ranks, started as torchrun starts them, of which one dies or stops.

    Returns:
        Exit code of the other, seconds that it lived on, and what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
        values |= {"OMP_NUM_THREADS": 1, "DYING_RANK": dying, "SIGNAL": signal_name}
        with open(folder / f"output_{engine}_{rank}", "w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, Path(__file__).with_name("killed_rank.py"), engine, folder / f"killed_{engine}"],
                    env={**os.environ, **{key: str(value) for key, value in values.items()}},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    last_words = folder / f"killed_{engine}" / "death"
    try:
        wait_until(lambda: last_words.exists() or any(process.poll() is not None for process in processes), 120)
        start = time.monotonic()
        code = processes[1 - dying].wait(timeout=60)
        return code, time.monotonic() - start, (folder / f"output_{engine}_{1 - dying}").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"nothing for {seconds} seconds"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def deaths(folder):
    """For each way to lose a rank: what the others printed, and their exit codes and how long they took to end."""
    known = {}

    def death(*key):
        if key not in known:
            known[key] = run_with_a_death(folder, *key)
        return known[key]

    return death


@pytest.fixture(scope="module")
def outcomes(folder, deaths):
    """Outcome of a case on a number of ranks; one start of the processes for all of one number, two ranks first."""
    known = {}

    def outcome(ranks, name):
        if ranks not in known:
            if ranks == 2:
                for key in DEATHS[:2]:
                    deaths(*key)
            elif ranks in (1, 3):
                outcome(2, next(iter(cases(2))))
            known[ranks] = run_cases("engine_cases", ranks, folder, list(cases(ranks)))
        return known[ranks][name]

    return outcome


@pytest.fixture(scope="module")
def one_process(folder):
    """What a single process makes of a situation."""
    known = {}
    gc.freeze()  # each Trainer collects garbage, and what is imported by now is none

    def result(situation, name):
        if (situation, name) not in known:
            trainer = trainer_of("one", folder / name, situation, optim=name)
            train(trainer)
            known[situation, name] = result_of(trainer)
        return known[situation, name]

    yield result
    gc.unfreeze()


@pytest.mark.parametrize("case", list(cases(2)))
def test_on_two_ranks(outcomes, case):
    assert not outcomes(2, case), outcomes(2, case)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("case", list(cases(3)))
def test_resumed_on(outcomes, ranks, case):
    assert not outcomes(ranks, case), outcomes(ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(cases(4)))
def test_on_four_ranks(outcomes, case):
    assert not outcomes(4, case), outcomes(4, case)


@pytest.mark.parametrize(
    ("ranks", "run"),
    [*((2, run) for run in RUNS), *(pytest.param(4, run, marks=pytest.mark.slow) for run in RUNS_OF_FOUR)],
    ids=lambda value: str(value) if isinstance(value, int) else "_".join(value),
)
def test_ranks_equal_one_process(outcomes, folder, one_process, ranks, run):
    assert not outcomes(ranks, "_".join(run)), outcomes(ranks, "_".join(run))
    _, situation, name = run
    expected, found = one_process(situation, name), torch.load(result_path(folder, *run), weights_only=True)
    assert_close_results(expected, found)
    for parameter, value in initial_weights(situation).items():
        moved = not torch.equal(value, found["tensors"][parameter])
        assert moved == any(key.startswith(f"{parameter}: ") for key in found["tensors"]), parameter


@pytest.mark.parametrize(
    "death",
    [*DEATHS[:2], pytest.param(DEATHS[2], marks=pytest.mark.slow)],
    ids=lambda death: "_".join(map(str, death)),
)
def test_a_lost_rank_ends_the_others_with_an_error(deaths, death):
    """A killed one is noticed at once, a stopped one after the time limit of the process group."""
    code, seconds, output = deaths(*death)
    assert code not in (0, -9), output[-3000:]
    assert "distributed_step.py" in output, output[-3000:]
    assert seconds < TIMEOUT_SECONDS + 15, output[-3000:]
