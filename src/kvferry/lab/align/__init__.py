"""The bench of aligners: how well a receiver goes on when a passage comes to it only as a mapped cache."""
