"""Objectives: what a step minimises, one a method of training."""
