"""Fitting: closed forms from paired caches, and maps trained on the receiver's answers."""
