"""One module per subcommand of ``kv-eviction``: ``add_parser(commands)`` adds it."""
