"""How fast the Triton kernels are, against copy bandwidth and FlashAttention itself.

    python -m harness.bench.kernels --output results/kernels-gpu.json

All of it is timed in one process (CUDA events, median): a copy, FlashAttention on every batch that
is scored (``mass_kernels.py``), the scoring, and packing (``pack_kernels.py``).
"""

from __future__ import annotations

import argparse
from typing import Any

from ..records.provenance import provenance
from .device_time import copy_bandwidth, median_ms, median_ms_prepared
from .mass_kernels import measure_mass
from .output import output_file, write_record
from .pack_kernels import measure_packing
from .shapes import SHAPES

PARTS = ("mass", "packing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="all tile shapes, not the chosen one")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--output", type=output_file, required=True)
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    block_size = arguments.block_size
    measured: list[dict[str, Any]] = []
    packing: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        if "packing" in arguments.parts:
            packing += measure_packing(shape, block_size, bandwidth, median_ms_prepared)
        if "mass" in arguments.parts:
            measured += measure_mass(shape, block_size, bandwidth, arguments.sweep, median_ms)
    fields = {
        "copy_bandwidth_bytes_per_second": bandwidth,
        "measured": measured,
        "packing": packing,
    }
    write_record(arguments.output, "kernels", fields, provenance([__spec__.name], "cuda"))


if __name__ == "__main__":
    main()
