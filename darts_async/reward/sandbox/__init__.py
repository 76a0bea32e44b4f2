"""Runs programs that no person has read, such as those in responses of a model, and lets none of them do harm."""
