__version__ = "0.1.0"

from . import tasks as tasks  # registers the environments with gymnasium
