"""What the server that forks the runs of `fault_runs` does first: the seconds of a first engine."""

import threading

import torch

import fault_runs

torch.set_num_threads(1)
fault_runs.dual_of(1).compile((torch.zeros(1, 1, 8, 8),))
threads = [thread.name for thread in threading.enumerate()]
assert len(threads) == 1, threads  # more would not live on in a fork
