"""The steering scalar's parts: data and training, measures."""
