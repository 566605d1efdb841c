"""Steady loads: where sequences begin, what a window tells, where a step's time goes at best."""

import re
from pathlib import Path

import numpy as np
import pytest

from harness.analysis.renewal import (
    length_at_hand,
    mean_age,
    mean_length,
    mean_live_tokens,
    new_length,
)
from harness.analysis.roofline import largest_ratio, steady_rows, step_seconds
from harness.analysis.steady_aggregate import steady_figures
from harness.resources.kernel_classes import CLASSES, busy, class_of, time_by_class
from harness.resources.steady_loop import Gauges, Progress, measure, num_aged
from harness.resources.steady_requests import draw_request
from harness.study.steady_load import SteadyLoad

KERNELS = Path(__file__).parents[2] / "vllm_plugins" / "kernels"
LENGTHS = (3, 9)
LOAD = SteadyLoad(8, 5, LENGTHS, settle_seconds=2.0, measured_seconds=20.0)


@pytest.mark.parametrize("lengths", [(3, 9), (1, 1), (64, 8192)])
def test_the_mean_age_is_that_of_the_stationary_distribution(lengths):
    number = np.arange(lengths[0], lengths[1] + 1)
    # A sequence at hand has length L with weight L, and each age below it is as likely.
    assert mean_age(lengths) == pytest.approx(np.sum(number * (number - 1) / 2) / number.sum())
    assert mean_length(lengths) == number.mean()


def test_lengths_at_hand_are_drawn_by_their_length():
    chances = (np.arange(42_000) + 0.5) / 42_000
    drawn = [length_at_hand(chance, LENGTHS) for chance in chances]
    # 3 + .. + 9 is 42: every length has its own share of a thousandth.
    assert [drawn.count(length) for length in range(3, 10)] == [1000 * n for n in range(3, 10)]
    fresh = [new_length(chance, LENGTHS) for chance in chances]
    assert {fresh.count(length) for length in range(3, 10)} == {6000}


@pytest.mark.parametrize("lengths", [(1, 1), (3, 9), (64, 32768)])
def test_no_draw_leaves_the_lengths(lengths):
    for draw in (length_at_hand, new_length):
        assert draw(0.0, lengths) == lengths[0]
        assert draw(np.nextafter(1.0, 0.0), lengths) == lengths[1]


def test_what_lives_of_a_sequence():
    tokens = 5 + mean_age(LENGTHS)
    assert mean_live_tokens(5, LENGTHS, 0.0) == tokens
    assert mean_live_tokens(5, LENGTHS, 0.9) == pytest.approx(0.1 * tokens)
    assert mean_live_tokens(5, LENGTHS, 0.0, budget_tokens=6) == 6
    assert num_aged(LOAD, {}, 4 * int(np.ceil(tokens))) == 4
    assert num_aged(LOAD, {"kv_sparsity": 0.5}, 4 * int(np.ceil(tokens))) == 8
    assert num_aged(LOAD, {"kv_budget_tokens": 2}, 7) == 3
    assert num_aged(LOAD, {}, 3) == 0


def test_a_request_is_the_same_for_every_method():
    aged, new = (draw_request(LOAD, 7, 3, aged, 100) for aged in (True, False))
    assert aged == draw_request(LOAD, 7, 3, True, 100)
    assert aged != draw_request(LOAD, 8, 3, True, 100)
    assert len(new.prompt) == 5
    assert aged.prompt[:5] == new.prompt, "an age puts tokens behind a prompt"
    ages = []
    for number in range(2000):
        drawn = draw_request(LOAD, 0, number, True, 100)
        ages.append(len(drawn.prompt) - 5)
        assert drawn.output_tokens >= 1
        assert LENGTHS[0] <= ages[-1] + drawn.output_tokens <= LENGTHS[1]
    assert np.mean(ages) == pytest.approx(mean_age(LENGTHS), abs=4 * np.std(ages) / 2000**0.5)


class MadeUpEngine:
    """Computes two prompts a step, then a token of each; holds so many requests together."""

    vocabulary = 100
    kv_blocks = 50
    kv_cache_tokens = 24

    def __init__(self, room=4):
        self.room, self.waiting, self.running = room, [], {}
        self.prompts, self.added, self.now, self.stopped, self.profiled = {}, [], 0.0, False, 0
        self.told = Gauges(0, 0)

    def add(self, number, request):
        self.waiting.append((number, request))
        self.added.append(number)
        self.prompts[number] = len(request.prompt)

    def step(self):
        self.now += 0.1
        made = []
        for number in list(self.running):
            self.running[number] -= 1
            made.append(Progress(number, 1, self.running[number] == 0))
            if not self.running[number]:
                del self.running[number]
        while self.waiting and len(self.running) < self.room:
            number, request = self.waiting.pop(0)
            self.running[number] = request.output_tokens
        if made:  # a step that brings nothing may be the load's before, and tell of that
            self.told = Gauges(len(self.running), 2 * len(self.running))
        return made

    def gauges(self):
        return self.told

    def counters(self):
        seconds = round(self.now, 1)
        return {"preemptions": 0, "decision_seconds": seconds, "scoring_seconds": {"a": seconds}}

    def eviction(self):
        return None

    def host(self, step):
        step()
        return {"scheduling": 3.0}

    def split(self, step):
        for _ in range(3):
            step()
        self.profiled += 3

    def stop(self):
        self.stopped = True


def test_a_window_of_a_loop():
    engine = MadeUpEngine()
    record = measure(LOAD, 0, {}, engine, clock=lambda: engine.now)
    assert record["num_aged"] == 3
    assert all(engine.prompts[number] == 5 for number in engine.added[3:])
    assert record["requests_ended"] == len(engine.added) - LOAD.num_sequences
    assert (engine.stopped, engine.profiled, record["split"]) == (True, 3, None)
    assert record["host"] == {"scheduling": 3.0}
    assert record["seconds"] == pytest.approx(20.0, abs=0.11)
    assert record["ms_per_step"] == pytest.approx(100)
    assert record["running"] == record["tokens_per_step"] == pytest.approx(4)
    assert record["kv_blocks_used"] == pytest.approx(8)
    assert record["sub_windows"] == pytest.approx([40] * 4, rel=0.03)
    assert record["output_tokens"] == pytest.approx(800, rel=0.01)
    assert record["settling_seconds"] >= LOAD.settle_seconds
    assert record["decision_seconds"] == pytest.approx(record["seconds"], abs=0.1)
    assert record["scoring_seconds"] == {"a": record["decision_seconds"]}


def test_nobody_waits_for_an_aged_sequence_that_waits_for_memory():
    engine = MadeUpEngine(room=2)
    engine.kv_blocks = 4
    load = SteadyLoad(3, 5, (900, 1000), settle_seconds=2.0, measured_seconds=1.0)
    engine.kv_cache_tokens = 10_000
    record = measure(load, 0, {}, engine, clock=lambda: engine.now)
    assert (record["num_aged"], record["running"]) == (3, 2)
    assert record["settling_seconds"] == pytest.approx(2.1, abs=0.11)


def test_a_pool_that_the_load_before_filled_is_no_full_pool():
    """What an engine tells first may still be of the load before."""
    engine = MadeUpEngine()
    engine.told = Gauges(25, engine.kv_blocks)
    load = SteadyLoad(3, 5, (900, 1000), settle_seconds=0.0, measured_seconds=1.0)
    engine.kv_cache_tokens = 10_000
    record = measure(load, 0, {}, engine, clock=lambda: engine.now)
    assert record["settling_seconds"] == pytest.approx(0.2), "a step admits them, one answers"
    assert record["tokens_per_step"] == 3


def test_a_window_has_a_step_even_if_that_takes_longer():
    engine = MadeUpEngine()
    load = SteadyLoad(2, 5, LENGTHS, settle_seconds=0.0, measured_seconds=0.05)
    record = measure(load, 0, {}, engine, clock=lambda: engine.now)
    assert (record["steps"], len(record["sub_windows"])) == (1, 1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwd>>", "attention"),
        ("flash::prepare_varlen_num_blocks_kernel(int, ...)", "attention"),
        ("void flash::flash_fwd_splitkv_combine_kernel<...>", "attention"),
        ("void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16>", "other"),
        ("nvjet_tst_192x128_64x5_2x1_v_bz_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn", "products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "products"),
        ("triton_red_fused_rms_norm_0", "other"),
        ("Memcpy HtoD (Pinned -> Device)", "other"),
    ],
)
def test_kernels_by_their_names(name, kind):
    assert class_of(name) == kind


def test_every_kernel_of_ours_has_a_class():
    source = "\n".join(path.read_text() for path in KERNELS.glob("*.py"))
    ours = set(re.findall(r"^def (_\w+_kernel)\(", source, re.MULTILINE))
    assert {"_decode_mass_kernel", "_start_kernel", "_choose_kernel", "_move_kernel"} <= ours
    packing = {"_choose_kernel", "_key_difference_kernel", "_move_kernel"}
    assert {name: class_of(name) for name in ours} == {
        name: "packing" if name in packing else "scores" for name in ours
    }


def test_time_by_class_and_time_in_which_nothing_ran():
    events = [("nvjet_a", 0.0, 3.0), ("_move_kernel", 2.0, 4.0), ("flash_b", 6.0, 7.0)]
    times = time_by_class(events)
    assert set(times) == set(CLASSES)
    assert (times["products"], times["packing"], times["attention"]) == (3.0, 2.0, 1.0)
    assert busy(events) == busy(events[::-1]) == 5.0, "streams overlap"
    assert busy([]) == 0.0
    assert busy([("a", 0.0, 9.0), ("b", 1.0, 2.0), ("c", 3.0, 4.0)]) == 9.0


@pytest.mark.parametrize(("longest", "ceiling"), [(8192, 5.2), (16384, 7.2), (32768, 9.2)])
def test_the_ceilings_on_an_h100_at_default_memory(longest, ceiling):
    """Those that were computed by hand first, told to a digit (1%), with the input embedding among
    the weights that a step reads (0.35 ms of stock's 24 ms, 1.4%)."""
    load = {"num_sequences": 512, "prompt_tokens": 256, "output_tokens": [64, longest]}
    stock = record(load, "stock", 0.0)
    ratio = largest_ratio(record(load, "h2o", 0.9), stock)
    assert ratio == pytest.approx(ceiling, rel=0.025)
    assert largest_ratio(stock, stock) == 1.0


def test_a_step_at_the_roofline():
    load = {"num_sequences": 512, "prompt_tokens": 256, "output_tokens": [64, 8192]}
    rows, live = steady_rows(load, 27507 * 16, 0.0)
    assert rows == pytest.approx(147, abs=1)
    assert 1e3 * step_seconds(rows, live, "H100") == pytest.approx(24.5, rel=0.02)
    rows, live = steady_rows(load, 27507 * 16, 0.9)
    assert (rows, live) == (512, pytest.approx(299, abs=1))
    assert 1e3 * step_seconds(rows, live, "H100") == pytest.approx(16.6, rel=0.02)
    # A tenth of the lengths is a tenth of what lives, so stock's step of it is ours.
    live_load = {**load, "prompt_tokens": 26, "output_tokens": [6, 819]}
    assert steady_rows(live_load, 27507 * 16, 0.0) == (512, pytest.approx(live, rel=0.01))


def test_a_machine_whose_numbers_are_not_known_has_no_ceiling():
    load = {"num_sequences": 2, "prompt_tokens": 4, "output_tokens": [1, 2]}
    made = {**record(load, "h2o", 0.9), "hardware": {}}
    assert largest_ratio(made, made) is None


def test_figures_over_seeds():
    load = {"num_sequences": 512, "prompt_tokens": 256, "output_tokens": [64, 8192]}
    runs = [
        {
            **record(load, "h2o", 0.9),
            **dict.fromkeys(("tokens_per_step", "running", "kv_blocks_used"), 8.0),
            "steps": 10,
            "ms_per_step": 20.0 + seed,
            "kv_blocks": 50,
            "decision_seconds": 0.01,
            "output_tokens_per_second": 100.0,
            "sub_windows": [90.0, 105.0 + seed],
            "split": {"attention": 1.0 + seed},
            "host": {"scheduling": 2.0 + seed},
        }
        for seed in (0, 1)
    ]
    made = steady_figures(runs)
    assert made["ms_per_step"]["mean"] == 20.5
    assert made["sub_windows_of_mean"] == [0.9, 1.06]
    assert made["last_third"] is None, "half a minute has no thirds worth the name"
    falling = [90.0] * 8 + [80.0, 70.0, 60.0, 50.0]
    assert steady_figures([{**runs[0], "sub_windows": falling}])["last_third"] == 65.0
    assert made["split"] == {"attention": 1.5}
    assert made["host"] == {"scheduling": 2.5}
    del runs[1]["host"]
    assert steady_figures(runs)["host"] is None, "as in older records"
    assert made["decision_ms_per_step"] == pytest.approx(1.0)
    assert made["roofline_ms_per_step"] == pytest.approx(16.6, rel=0.02)
    assert steady_figures([{**runs[0], "split": None}])["split"] is None


def record(load, policy, sparsity):
    return {
        "kind": "steady",
        "policy": policy,
        "sparsity": sparsity,
        "budget_tokens": None,
        "kv_cache_tokens": 27507 * 16,
        "hardware": {"gpu": "NVIDIA H100 80GB HBM3"},
        "specification": {"load": load, "engine": {"model": "llama-3.1-8b"}},
    }
