"""Tables of the kernels' record: scoring, and packing where it was measured."""

from __future__ import annotations

from typing import Any

from ..report.tables import Row, markdown

_PACKING = (
    "Packing, all layers at once: time, bytes, and their share of a copy's bandwidth. Bytes "
    "are the scores and keys that choosing reads, once, and all that moving reads and writes."
)


def kernels_table(record: dict[str, Any]) -> str:
    """A table for each part of the record; what an older record lacks is left out."""
    parts = []
    if record["measured"]:
        parts.append(markdown(_mass_rows(record)))
    if record.get("packing"):
        parts += [_PACKING, markdown(_pack_rows(record))]
    return "\n\n".join(parts)


def _mass_rows(record: dict[str, Any]) -> list[Row]:
    entries = record["measured"]
    copy = record["copy_bandwidth_bytes_per_second"] / 1e12
    by_token = any(entry.get("scores") == "tokens" for entry in entries)
    rates = any("flops_per_second" in entry for entry in entries)
    shapes = _several_shapes(entries)
    read = "keys and scores" if any("score_bytes" in entry for entry in entries) else "keys read"
    head = [
        "batch",
        "scored queries",
        "mass us" if by_token else "block mass us",
        "FlashAttention us",
        "ratio",
        f"{read} at, of copy ({copy:.2f} TB/s)",
    ]
    table: list[Row] = [(*head, "TFLOP/s", "FlashAttention TFLOP/s") if rates else tuple(head)]
    for entry in entries:
        decode = entry["batch"].startswith("decode")
        row = [
            _named(entry, entry["batch"], shapes)
            + (", by token" if entry.get("scores") == "tokens" else ""),
            "all" if entry["window"] is None else f"last {entry['window']}",
            f"{entry['ms'] * 1e3:.0f}",
            f"{entry['attention_ms'] * 1e3:.0f}",
            f"{entry['ms'] / entry['attention_ms']:.2f}",
            f"{100 * entry['share_of_copy_bandwidth']:.0f}%" if decode else "-",
        ]
        if rates:
            row += [
                "-" if decode or name not in entry else f"{entry[name] / 1e12:.0f}"
                for name in ("flops_per_second", "attention_flops_per_second")
            ]
        table.append(tuple(row))
    return table


def _pack_rows(record: dict[str, Any]) -> list[Row]:
    parts = ("choose", "move", "both")
    shapes = _several_shapes(record["packing"])
    table: list[Row] = [("packed", "policy", "tokens moved", *parts)]
    for entry in record["packing"]:
        table.append(
            (
                _named(entry, entry["packs"], shapes),
                entry["policy"],
                f"{entry['moves']:,}",
                *(_part(entry, part) for part in parts),
            )
        )
    return table


def _part(entry: dict[str, Any], part: str) -> str:
    share = entry[f"{part}_share_of_copy_bandwidth"]
    return (
        f"{entry[f'{part}_ms'] * 1e3:.0f} us, {entry[f'{part}_bytes'] / 2**20:.1f} MiB, {share:.0%}"
    )


def _several_shapes(entries: list[dict[str, Any]]) -> bool:
    return len({entry["shape"] for entry in entries}) > 1


def _named(entry: dict[str, Any], name: str, shapes: bool) -> str:
    return f"{entry['shape']}, {name}" if shapes else name
