"""The parts of the experiment on reward hacking: the task, its rewards and detector; the policy and its training."""
