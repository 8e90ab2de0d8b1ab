"""Run the command line as ``python -m kdctl`` (what ``accelerate launch -m kdctl`` does)."""

from kdctl.cli.boundary import main

main()
