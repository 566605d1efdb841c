"""Records of several samples of one prompt."""

from vllm_plugins.siblings import Siblings


def test_the_last_sample_carries_the_records_of_all():
    siblings = Siblings()
    assert siblings.add("cmpl-1-aa", {"a": 1}) == {"a": 1}
    assert siblings.add("1_cmpl-2-bb", {"b": 1}) == [{"b": 1}]
    assert siblings.add("0_cmpl-3-cc", {"c": 0}) == [{"c": 0}]
    assert siblings.add("0_cmpl-2-bb", {"b": 0}) == [{"b": 0}, {"b": 1}]


def test_parents_are_forgotten_in_time():
    siblings = Siblings(limit=2)
    for parent in "xyz":
        siblings.add(f"0_{parent}", {})
    assert len(siblings.add("1_x", {})) == 1
    assert len(siblings.add("1_z", {})) == 2
