"""The tasks of a study: checked, and as measurements."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..inputs.tasks.jsonl import PREFIX, file_of, read_lines, sha256_of
from ..inputs.tasks.registry import GENERATED, LONG_GENERATION, TASKS
from ..inputs.tasks.sample import PREFIXES, QUESTIONS
from ..inputs.text import Text
from .points import slug
from .specification import Answers

if TYPE_CHECKING:
    from .settings import Study


def check_tasks(study: Study) -> None:
    """Refuse tasks that are not known, and what does not go with tasks.

    Raises:
        UsageError: the first that is wrong.

    """
    for name in study.tasks:
        if not isinstance(name, str) or not (name in TASKS or is_file(name)):
            close = difflib.get_close_matches(str(name), TASKS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"give {PREFIX}FILE or one of: "
            raise UsageError(f"unknown task {name!r}; {hint}{'' if close else ', '.join(TASKS)}")
    shown = [slug(_shown(name)) for name in study.tasks]
    if twice := sorted({name for name in shown if shown.count(name) > 1}):
        raise UsageError(f"--tasks names {twice[0]} twice; drop one, or rename its file")
    if study.task_question not in QUESTIONS:
        raise UsageError(f"--task-question must be one of: {', '.join(QUESTIONS)}")
    if study.task_prefix not in PREFIXES:
        raise UsageError(f"--task-prefix must be one of: {', '.join(PREFIXES)}")
    if not study.tasks and not study.measures_perplexity:
        raise UsageError("nothing to measure; name --tasks, or drop --no-perplexity")
    if study.throughput and not study.measures_perplexity:
        raise UsageError(
            "--throughput stands in the table of perplexity; give --perplexity beside --tasks"
        )
    if study.tasks and study.protocol == "decode":
        raise UsageError(
            "--protocol decode forces tokens, and tasks are answered; use --protocol chunked"
        )


def is_file(name: str) -> bool:
    """Whether a task is a user's own file."""
    return name.startswith(PREFIX) and name != PREFIX


def tasks_need(study: Study) -> dict[str, tuple[str, bool]]:
    """What settings have no effect without: by name, in words, and whether it is there."""
    tasks = ("--tasks", bool(study.tasks))
    asking = bool(set(study.tasks) & set(GENERATED))
    open_ended = any(name == LONG_GENERATION or is_file(name) for name in study.tasks)
    perplexity = ("--perplexity", study.measures_perplexity or "perplexity" in study.vary)
    return {
        "task_samples": tasks,
        "task_question": ("a task of this program's own that asks something", asking),
        "task_prefix": tasks,
        "task_output_tokens": (f"--tasks {LONG_GENERATION} or {PREFIX}FILE", open_ended),
        "num_samples": perplexity,
        "min_context": perplexity,
    }


def tasks_of(study: Study, text: Text) -> list[Answers]:
    """A measurement of each task.

    Raises:
        UsageError: a file cannot be read, or an answer leaves no prompt.

    """
    measured = []
    for name in study.tasks:
        own = name in GENERATED
        output = None if own else study.task_output_tokens
        if output is not None and output >= study.context_length:
            raise UsageError(
                f"--task-output-tokens {output} leaves no prompt in a context of "
                f"{study.context_length}; lower it"
            )
        path = file_of(name) if is_file(name) else None
        lines = read_lines(path) if path else []
        measured.append(
            Answers(
                text,
                _shown(name),
                study.task_samples,
                study.task_question,
                output,
                sha256_of(path) if path else None,
                max((line.max_tokens or study.task_output_tokens for line in lines), default=None),
                str(path) if path else "",
            )
        )
    return measured


def _shown(name: str) -> str:
    """A file without its folder."""
    return f"{PREFIX}{file_of(name).name}" if is_file(name) else name
