"""Decode steps: from a batch's last tokens to its next ones."""
