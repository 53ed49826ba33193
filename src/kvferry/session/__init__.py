"""Sender and receiver: what one reads, the other answers from."""
