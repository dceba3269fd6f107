"""What the experiments on a pretrained model share: SmolLM2-135M-Instruct, and texts that every machine has."""
