"""The parts of the experiment on oversight: the environment, the agent, its training."""
