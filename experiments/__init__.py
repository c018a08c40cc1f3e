"""Commands, `python -m experiments.NAME`; the signals are owned before anything that takes time is imported."""

import sys

from jaxcl import signals

if sys.argv[0] == "-m":  # as long as Python looks for the command's module
    signals.own()
