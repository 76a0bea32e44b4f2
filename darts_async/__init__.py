"""Asynchronous reinforcement learning of language models with distribution-aware rollout shaping."""
