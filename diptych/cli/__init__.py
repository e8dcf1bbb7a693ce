"""The `diptych` command, one file per subcommand."""
