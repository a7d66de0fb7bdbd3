"""Which training samples are hard to learn, mined as training goes on."""
