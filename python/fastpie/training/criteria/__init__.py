"""Criteria: losses of each sample, from logits and labels."""
