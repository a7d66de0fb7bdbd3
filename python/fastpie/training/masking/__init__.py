"""Masks that stay in force while the weights are trained."""
