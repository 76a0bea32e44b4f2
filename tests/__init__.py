"""The tests, in the rooms of what they test. What needs whole runs of real processes is in `whole_runs`."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The repository."""
