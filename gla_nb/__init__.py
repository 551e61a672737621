__version__ = "0.1.0"

import logging
import sys

# What we say goes where the program that imports us sends it, by default nowhere.
logging.getLogger("gla_nb").addHandler(logging.NullHandler())

try:
    from . import tasks as tasks  # registers the environments with gymnasium
except ImportError:
    if sys.argv[:1] != ["-m"]:  # `python -m gla_nb` reports of broken installations too
        raise
