"""Logs of other tools become runs: find them, read them, join their fits, write them."""
