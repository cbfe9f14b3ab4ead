"""Matrices that several ranks share out, on 2, 3 and 4 gloo processes; the cases are in ``sharing_cases.py``."""

import pytest
from gloo_ranks import run_cases
from sharing_cases import cases


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    known = {}

    def outcome(ranks, name):
        if ranks not in known:
            folder = tmp_path_factory.mktemp(f"ranks{ranks}")
            known[ranks] = run_cases("sharing_cases", ranks, folder, list(cases(ranks)))
        return known[ranks][name]

    return outcome


@pytest.mark.parametrize("name", list(cases(2)))
def test_on_two_ranks(outcomes, name):
    assert not outcomes(2, name), outcomes(2, name)


@pytest.mark.parametrize("name", list(cases(3)))
def test_on_three_ranks(outcomes, name):
    assert not outcomes(3, name), outcomes(3, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(cases(4)))
def test_on_four_ranks(outcomes, name):
    assert not outcomes(4, name), outcomes(4, name)
