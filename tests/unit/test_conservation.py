"""Every block is free, held or leaving: what is not so is told."""

import pytest
from vllm.v1.core.block_pool import BlockPool

from vllm_plugins.config import EvictionConfig
from vllm_plugins.conservation import Conservation, CountedManager
from vllm_plugins.ledger import Ledger


class Tables:
    """What ``CountedManager`` builds on: block tables by request."""

    def __init__(self, pool):
        self.pool, self.req_to_blocks = pool, {}

    def pop_blocks_for_free(self, request_id):
        return self.req_to_blocks.pop(request_id)


class Manager(CountedManager, Tables):
    def take(self, request_id, number):
        self.req_to_blocks[request_id] = self.pool.get_new_blocks(number)


@pytest.fixture
def groups():
    """Two KV-cache groups over 30 blocks; "b" shares two of a's, and has lost another."""
    pool = BlockPool(30, enable_caching=True, hash_block_size=4)
    made = [Manager(pool) for _ in range(2)]
    config = EvictionConfig(check_integrity=True)
    for manager in made:
        manager._ledger = Ledger(config, 4, 2, 30)
        manager.take("a", 5)
    tables = made[0].req_to_blocks
    pool.touch(tables["a"][:2])
    tables["b"] = [*tables["a"][:2], pool.null_block, pool.null_block, *pool.get_new_blocks(3)]
    conservation = Conservation(pool, made)
    conservation.check()
    return pool, made, conservation


def check(groups, sentence):
    with pytest.raises(AssertionError, match=sentence):
        groups[-1].check()


def test_a_block_that_nobody_holds_is_not_free(groups):
    (block,) = groups[0].get_new_blocks(1)
    check(groups, f"block {block.block_id}: 1 references, 0 holders, 0 leaving")


@pytest.mark.parametrize("references", [-1, 1])
def test_a_free_block_has_no_references(references, groups):
    groups[0].get_new_blocks(1)[0].ref_cnt = references
    groups[0].free_block_queue.num_free_blocks += 1
    check(groups, f"{references} references, 0 holders")


def test_a_free_block_is_in_the_queue(groups):
    groups[0].get_new_blocks(1)[0].ref_cnt = 0
    check(groups, "15 free \\+ 13 held != 29 blocks")


def test_a_held_block_is_not_free(groups):
    pool, (manager, _), _ = groups
    pool.free_blocks(manager.req_to_blocks["a"][-1:])
    check(groups, "0 references, and it is held")


def test_a_shared_block_has_a_reference_for_each_who_holds_it(groups):
    pool, (manager, _), _ = groups
    pool.free_blocks(manager.req_to_blocks["a"][:1])
    check(groups, "block 1: 1 references, 2 holders")


def test_a_table_names_no_block_twice(groups):
    pool, (manager, _), _ = groups
    table = manager.req_to_blocks["b"]
    pool.touch(table[-1:])
    table.append(table[-1])
    check(groups, "b holds a block twice")


def test_two_groups_hold_no_block_together(groups):
    pool, managers, _ = groups
    (block,) = managers[0].req_to_blocks["a"][-1:]
    pool.touch([block])
    managers[1].req_to_blocks["c"] = [block]
    check(groups, f"blocks \\[{block.block_id}\\] are held by two KV-cache groups")


def test_who_leaves_returns_its_blocks_once(groups):
    """With steps in flight some checks find them on their way; nothing else is excused by it."""
    pool, (manager, _), conservation = groups
    blocks = manager.pop_blocks_for_free("a")
    conservation.check()
    conservation.check()
    assert sorted(conservation.leaving.tolist()) == [block.block_id for block in blocks]
    pool.touch(blocks[3:4])  # a hit while it leaves
    manager.req_to_blocks["c"] = blocks[3:4]
    conservation.check()
    pool.free_blocks(blocks)
    conservation.check()
    assert not len(conservation.leaving)
    pool.touch(blocks[3:4])
    check(groups, "2 references, 1 holders, 0 leaving")
