"""Training: from labelled conversations to servable adapters, N of them in one pass."""
