"""Flags handed on to ``vllm serve``: what would undo eviction is refused before vLLM is imported.

vLLM itself would find most of it out half a minute later, with the weights loaded, and the rest
never. ``vllm_plugins.refusals.engine.check_engine`` is the full check, in the engine; these are its
sentences. Flags are read as vLLM's parser reads them: ``--a_b`` is ``--a-b``, a unique beginning
stands for the whole, and ``--x.y V`` is part of ``--x``. ``--config FILE`` holds more of them, as
if they stood before those of the command line.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vllm_plugins.config import EvictionConfig
from vllm_plugins.parsing import EvictionConfigError, check_renamed
from vllm_plugins.platforms import FP8
from vllm_plugins.refusals.engine import PLAIN_CACHES, SENTENCES

from ..errors import UsageError

_ALIASES = {
    "-pp": "--pipeline-parallel-size",
    "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-sc": "--speculative-config",
    "-tp": "--tensor-parallel-size",
}
_ALWAYS = {
    "--kv-transfer-config": SENTENCES["connector"].format(connector="another one"),
    "--kv-offloading-size": SENTENCES["connector"].format(connector="one that offloads"),
    "--speculative-config": SENTENCES["speculative"],
    "--spec-method": SENTENCES["speculative"],
    "--spec-model": SENTENCES["speculative"],
    "--spec-tokens": SENTENCES["speculative"],
    "--enable-dbo": SENTENCES["ubatching"],
    "--attention-backend": "--attention-backend would replace eviction's own; drop it",
    "--worker-cls": "--worker-cls would replace eviction's own; drop it",
    "--model": "the model is named twice; give it as the first argument only, without --model",
}
"""Refused whatever the value."""
_ABOVE_ONE = {
    "--pipeline-parallel-size": SENTENCES["pipeline"],
    "--decode-context-parallel-size": SENTENCES["context_parallel"],
    "--prefill-context-parallel-size": SENTENCES["context_parallel"],
}
_KV_CACHE_DTYPES = ("auto", *PLAIN_CACHES, *FP8)
"""Which of them the model and the platform allow is known later."""


def _off(switch: str) -> str:
    return f"--no-{switch.removeprefix('--')}"


_SWITCHES = ("--enable-prefix-caching", "--enable-chunked-prefill")
"""On unless told, and read by ``kv-eviction serve``."""
_READ = (
    *(*_ALWAYS, *_ABOVE_ONE, "--kv-cache-dtype", "--disable-hybrid-kv-cache-manager"),
    *("--logits-processors", *_SWITCHES, *map(_off, _SWITCHES)),
)
"""Known by a unique beginning, too."""
_SHORTEST = len("--kv-t")
"""A shorter beginning of a flag stands for too many of vLLM's to be one of ours."""


class Passthrough:
    """The flags of a command line that are vLLM's, looked up by their whole names.

    Args:
        flags: as given, in order.

    Raises:
        UsageError: ``--config`` is there twice, or names no YAML file of settings, or a switch in
            it is off in a spelling that vLLM ignores.

    """

    def __init__(self, flags: Sequence[str]) -> None:
        self.flags: list[str] = []
        for flag in flags:  # vLLM reads a file only where --config is a word of its own
            self.flags += flag.split("=", 1) if flag.startswith("--config=") else [flag]
        if [flag for flag, _ in _pairs(self.flags)].count("--config") > 1:
            raise UsageError("--config is given more than once, and vLLM reads one file; give one")
        given = dict(_pairs(self.flags))
        path = given.get("--config")
        self._settings = {} if path is None else _read(path)
        self._of_file = _words(self._settings)
        self._values = dict(_pairs(self._of_file)) | given

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> str | None:
        """The value of ``name``; the last one counts. Empty for a flag without a value."""
        return self._values.get(name)

    def switch(self, name: str) -> bool | None:
        """Whether ``--name`` was said last, or ``--no-name``; None: neither."""
        both = (name, _off(name))
        pairs = (*_pairs(self._of_file), *_pairs(self.flags))
        said = [given for given, _ in pairs if given in both]
        return said[-1] == name if said else None

    def take_switch(self, name: str) -> bool | None:
        """Remove ``--name`` and ``--no-name`` from the flags; what ``switch`` told before."""
        said = self.switch(name)
        for both in (name, _off(name)):
            self.take(both)
        return said

    def take(self, name: str) -> list[str]:
        """Remove ``name`` from the flags; its values, or the file's where no flag had it."""
        given = any(flag == name for flag, _ in _pairs(self.flags))
        taken, self.flags = _split(self.flags, name)
        self._values.pop(name, None)
        return taken if given else _split(self._of_file, name)[0]

    def check(self, config: EvictionConfig, own_flags: Iterable[str]) -> None:
        """Refuse what undoes eviction, what is nearly a flag of ours, and ours in the file.

        The block size alone may be set there, as it is vLLM's own flag too.

        Args:
            config: eviction settings of the server.
            own_flags: of ``kv-eviction serve``.

        Raises:
            EvictionConfigError: which flag, and what to do instead. ``UsageError``: a misspelt one,
                or one that the file cannot set.

        """
        own = list(own_flags)
        check_renamed(name.removeprefix("--").replace("-", "_") for name in self._values)
        for key in self._settings:
            if (flag := _whole_name(f"--{key}")) in own and flag != "--block-size":
                raise UsageError(
                    f"--config sets {key}, which only the command line can; drop it from the file "
                    f"and give {flag}"
                )
        for name, value in self._values.items():
            if name in _ALWAYS:
                raise EvictionConfigError(_ALWAYS[name])
            if name in _ABOVE_ONE and value not in ("1", ""):
                raise EvictionConfigError(_ABOVE_ONE[name])
            if name == "--kv-cache-dtype" and value not in _KV_CACHE_DTYPES:
                raise EvictionConfigError(SENTENCES["kv_cache_dtype"].format(dtype=value))
            if name == "--disable-hybrid-kv-cache-manager" and config.layer_groups > 1:
                groups = config.layer_groups
                raise EvictionConfigError(SENTENCES["layer_groups_pool"].format(groups=groups))
            if name not in own:
                longer = [flag for flag in own if flag.startswith(name) and len(name) >= _SHORTEST]
                if close := [*difflib.get_close_matches(name, own, 1, 0.85), *longer]:
                    raise UsageError(f"unknown flag {name}; did you mean {close[0]}?")


def dashed(word: str, flags: Sequence[str]) -> str:
    """``--a_b`` as ``--a-b`` where that is one of ``flags``; any other word as it is."""
    name, equals, value = word.partition("=")
    whole = name.replace("_", "-")
    return whole + equals + value if whole in flags else word


def _pairs(flags: Sequence[str]) -> Iterable[tuple[str, str]]:
    for index, flag in enumerate(flags):
        if not flag.startswith("-") or _is_number(flag):
            continue
        _, equals, value = flag.partition("=")
        if not equals and index + 1 < len(flags) and not flags[index + 1].startswith("--"):
            value = flags[index + 1]
        yield _whole_name(flag), value


def _whole_name(flag: str) -> str:
    name = flag.partition("=")[0].partition(".")[0]
    if not name.startswith("--"):
        return _ALIASES.get(name, name)
    name = name.replace("_", "-")
    begun = [whole for whole in _READ if whole.startswith(name) and len(name) >= _SHORTEST]
    return begun[0] if len(begun) == 1 else name


def _split(flags: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """The values of ``name``, and all that is left without them."""
    taken, kept, inside = [], [], False
    for flag in flags:
        if flag.startswith("-") and not _is_number(flag):
            inside = _whole_name(flag) == name
            if inside and "=" in flag:
                taken.append(flag.partition("=")[2])
            elif not inside:
                kept.append(flag)
        else:
            (taken if inside else kept).append(flag)
    return taken, kept


def _read(path: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read --config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, Mapping):
        raise UsageError(f"--config {path} is no mapping of flags to values")
    return {str(key): value for key, value in settings.items()}


def _words(settings: Mapping[str, Any]) -> list[str]:
    """A file as flags, by the rules of ``FlexibleArgumentParser.load_config_file``.

    Raises:
        UsageError: a switch is off in a spelling under which vLLM leaves it on.

    """
    words: list[str] = []
    for key, value in settings.items():
        flag = f"--{key}"
        if value is True:
            words.append(flag)
        elif value is False:  # vLLM looks for --no-KEY as it is spelt; no flag has an underscore
            if "_" not in key:
                words.append(_off(flag))
            elif _whole_name(flag) in _SWITCHES:
                spelt = key.replace("_", "-")
                raise UsageError(f"vLLM ignores {key}: false in --config; write {spelt}: false")
        elif isinstance(value, list):
            words += [flag, *map(str, value)] if value else []
        else:
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def _is_number(flag: str) -> bool:
    try:
        float(flag)
    except ValueError:
        return False
    return True
