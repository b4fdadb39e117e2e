"""Policies as programs of integers, and the runtimes that run them."""
