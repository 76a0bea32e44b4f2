"""Runs from Python, as the command line starts them: in a notebook, a script or a test.

from launcher.api import run

result = run("launcher/configs/quickstart.yaml", {"learner.steps": 20}, reward=my_function)
print(result.evaluations[-1]["reward/mean"], result.run_dir)
"""

from darts_async.errors import ConfigError
from launcher.api.result import Result, RunFailedError
from launcher.api.run import run

__all__ = ["ConfigError", "Result", "RunFailedError", "run"]
