"""The quickstart: a task made by code, a verifier, and a small warm-started model that is shipped.

Nothing else in the package imports it: a run names it, as it would name a task and a model of the user's.
"""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
"""Directory of the shipped model and tokenizer, in Hugging Face format: `model.path: darts_async.quickstart:model`."""
