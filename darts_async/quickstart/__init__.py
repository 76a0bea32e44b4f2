"""The quickstart: a task made by code, a verifier, and a small warm-started model that is shipped."""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
"""Directory of the shipped model and tokenizer, in Hugging Face format."""
