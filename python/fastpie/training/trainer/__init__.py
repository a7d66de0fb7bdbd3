"""The loop: steps, processes, checkpoints, evaluation, log."""
