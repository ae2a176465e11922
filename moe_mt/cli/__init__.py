"""Words on a terminal: arguments, progress and exit codes; the only room that prints.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 unexpected,
2 usage or input, 3 model missing or unreadable, 4 does not fit, 5 done but flagged (with
``--strict``), 130 interrupted.
"""

from moe_mt.cli.main import main

__all__ = ["main"]
