"""The benchmark of single decisions: every case decides, at today's defaults."""

import pytest

from harness.bench import decisions


@pytest.mark.parametrize(("policy", "parameters"), decisions.CASES)
@pytest.mark.parametrize("keep", [15, 8])
def test_every_case_is_a_decision(policy, parameters, keep):
    assert len(decisions.measure(policy, parameters, 16, keep, 2)) == 2
