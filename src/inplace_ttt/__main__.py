"""Run the command line: ``python -m inplace_ttt`` is ``inplace-ttt``."""

from .cli import main

main()
