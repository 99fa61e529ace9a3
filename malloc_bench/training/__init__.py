"""Fit a backbone and keep its weights."""
