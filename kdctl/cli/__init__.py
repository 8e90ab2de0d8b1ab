"""The command line: the only folder that knows typer and rich."""
