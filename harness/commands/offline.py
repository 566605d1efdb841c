"""``kv-eviction offline``: a study, or a quick comparison by flags, on as few engines as can be."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_plugins.policies import policy_names

from ..errors import UnwritableFile, UsageError
from ..inputs.corpora import DOCUMENT_MODES
from ..inputs.tasks.registry import TASKS
from ..inputs.tasks.sample import PREFIXES, QUESTIONS
from ..inputs.windows import ALL_WINDOWS
from ..study.settings import DTYPES, KV_CACHE_DTYPES, Study, check_folder_name, read_study
from ..study.specification import PROTOCOLS
from .eviction_flags import add_eviction_flags, eviction_settings
from .interrupts import polite_ends

_DEFAULTS = Study()


def add_parser(commands: Any) -> None:
    """Add the subcommand to ``commands`` (of ``ArgumentParser.add_subparsers``).

    Flags have no defaults of their own: a flag that is given overrides the study's file, which
    overrides the defaults of ``Study``.
    """
    offline = commands.add_parser(
        "offline",
        help="perplexity, tasks, memory and speed of methods at sparsities",
        argument_default=argparse.SUPPRESS,
    )

    def add(flag: str, text: str, **options: Any) -> None:
        default = getattr(_DEFAULTS, flag.removeprefix("--").replace("-", "_"), None)
        if isinstance(default, tuple):
            default = " ".join(map(str, default))
        shown = "" if default in (None, "", False, {}) else f" [{default}]"
        offline.add_argument(flag, help=f"{text}{shown}", **options)

    count = {"type": int, "metavar": "N"}
    tokens = {"type": int, "metavar": "TOKENS"}
    add("--study", "YAML file of settings, named as the flags", type=Path, metavar="FILE")
    add("--model", "embedded name, folder, or Hugging Face id")
    add("--methods", f"of: {', '.join(policy_names())}", nargs="+", metavar="METHOD")
    add("--sparsity", "share of KV blocks evicted, 0 <= S < 1", nargs="+", metavar="S")
    add("--budget-tokens", "absolute budgets, instead of or beside sparsities", nargs="+", **tokens)
    add(
        "--dataset",
        "canterbury, wikitext, pg19, arxiv, text:FILE, jsonl:FILE, parquet:FILE, "
        "or a name for `datasets`; several: a comparison each",
        nargs="+",
    )
    add("--text-column", "column of the text, where it is not the usual one", metavar="NAME")
    add(
        "--document-mode",
        "join documents, or draw windows within whole ones",
        choices=DOCUMENT_MODES,
    )
    add("--context-length", "tokens per window", **tokens)
    add("--min-context", "first token of a window that is scored", **tokens)
    add(
        "--num-samples",
        f"windows per run; {ALL_WINDOWS}: those that tile the text",
        type=_windows,
        metavar="N",
    )
    add("--num-runs", "runs, on seeds 0, 1, ... [1]", **count)
    add("--seeds", "seeds of the runs", type=int, nargs="+", metavar="SEED")
    add(
        "--experiment-name",
        "folder of this experiment [the study's name, or the time]",
        metavar="NAME",
    )
    add("--output-dir", "where it goes [runs]", type=Path, metavar="DIR")
    add("--redo", "measure again what other code or settings measured", action="store_true")
    add(
        "--export-windows",
        "write the windows' token ids there as JSON, and measure nothing",
        type=Path,
        metavar="FILE",
    )
    add("--protocol", "prompts in chunks, or tokens forced one by one (CUDA)", choices=PROTOCOLS)
    add(
        "--prefill-chunk",
        "tokens a window advances between evictions; part of every result",
        **tokens,
    )
    add("--block-size", "tokens per KV block", **tokens)
    add("--max-num-seqs", "requests the engine runs at a time", **count)
    add(
        "--kv-pool-windows",
        "whole windows the KV pool holds, and windows scored at a time [max-num-seqs]",
        **count,
    )
    add("--enforce-eager", "no CUDA graphs [on CPU]", action=argparse.BooleanOptionalAction)
    add("--dtype", "of weights and activations [float32 on CPU, else auto]", choices=DTYPES)
    add(
        "--kv-cache-dtype",
        "of keys and values; fp8 on CUDA with FlashAttention 3",
        choices=KV_CACHE_DTYPES,
    )
    add(
        "--tasks",
        f"questions on long texts to answer and score: {', '.join(TASKS)}, jsonl:FILE",
        nargs="+",
        metavar="TASK",
    )
    add("--task-samples", "questions of a task per run", **count)
    add(
        "--task-question",
        "where a question stands: after the text, hidden from the evictions before it, or before "
        "it too",
        choices=QUESTIONS,
    )
    add(
        "--task-prefix",
        "whether all of a prompt is computed, or all but its end found in the prefix cache, where "
        "a dense request left it",
        choices=PREFIXES,
    )
    add("--task-output-tokens", "tokens of an answer whose task does not say", **tokens)
    add(
        "--perplexity",
        "measure perplexity [where no tasks are named]",
        action=argparse.BooleanOptionalAction,
    )
    add(
        "--throughput",
        "measure throughput too, in a pass of its own",
        action=argparse.BooleanOptionalAction,
    )
    add("--load-runs", "runs of the throughput pass [num-runs]", **count)
    add("--load-requests", "requests of the throughput pass [2 * max-num-seqs]", **count)
    add("--load-output-tokens", "output tokens of each [an eighth of the context]", **tokens)
    add_eviction_flags(offline, _DEFAULTS)
    offline.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run what is missing of the study, then report it; 1: some runs failed, or a record could not
    be written."""
    if "export_windows" in vars(arguments):
        return _export(_study(arguments), arguments.export_windows)
    from tqdm import tqdm

    from ..records.output import RecordElsewhere
    from ..report.experiment import report_experiment
    from ..report.terminal import text_table
    from ..sweep.offline import Sweep

    given = vars(arguments)
    study = _study(arguments)
    name = study.name or datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    if "experiment_name" in given:
        name = check_folder_name(given["experiment_name"], "--experiment-name")
    folder = given.get("output_dir", Path("runs")) / name
    sweep = Sweep(study, folder, redo=given.get("redo", False))
    for note in sweep.notes:
        print(f"kv-eviction: {note}", file=sys.stderr)
    if sweep.session.runs_skipped:
        print(f"{sweep.session.runs_skipped} run(s) are there already", file=sys.stderr)
    with tqdm(total=sweep.total_size, unit="window", dynamic_ncols=True) as bar:

        def progress(label: str, finished: int) -> None:
            bar.set_description(label, refresh=finished == 0)
            if finished:
                bar.update(finished)
            else:
                bar.unpause()  # the time an engine takes to start says nothing of what is left

        try:
            with polite_ends():
                sweep.run(progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; finished runs are kept, --experiment-name {folder.name} goes on"
            ) from None
        except (RecordElsewhere, UnwritableFile) as error:
            bar.close()
            print(
                f"kv-eviction: {error}; finished runs are kept, --experiment-name {folder.name} "
                "goes on",
                file=sys.stderr,
            )
            return 1
    for file, reason in sweep.failures:
        print(f"failed: {file}: {reason}", file=sys.stderr)
    if sweep.failures and not (sweep.session.runs_done or sweep.session.runs_skipped):
        raise UsageError(f"every run failed; the reasons are kept under {folder}")
    for varied, results in report_experiment(folder):
        print(f"\n{varied}\n\n{text_table(results)}" if varied else f"\n{text_table(results)}")
    print(f"\nrecords, tables, figures: {folder}/report.md")
    return 1 if sweep.failures else 0


def _windows(value: str) -> int | str:
    return value if value == ALL_WINDOWS else int(value)


def _export(study: Study, path: Path) -> int:
    from ..records.files import write_json
    from ..sweep.exported import exported_windows

    exported = exported_windows(study)
    write_json(path, exported)
    windows = sum(len(run["windows"]) for run in exported["runs"])
    print(f"{windows} windows of {exported['context_length']} tokens: {path}")
    return 0


def _study(arguments: argparse.Namespace) -> Study:
    given = vars(arguments)
    settings: dict[str, Any] = {}
    if "study" in given:
        settings = read_study(given["study"])
        settings.setdefault("name", given["study"].stem)
    names = {field.name for field in fields(Study)}
    settings |= {name: value for name, value in given.items() if name in names}
    return Study.parse(settings | eviction_settings(arguments))
