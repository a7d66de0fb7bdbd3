"""Which samples an epoch draws, and in what order."""
