"""Two examples for RouteCollator, and what its tests do with them."""

import re

import pytest
import torch

LONG = {
    "input_ids": [11, 12, 13, 14, 15],
    "route_ids": [1, 0, 2, 2, 1],
    "labels": [11, -100, 13, 14, 15],
    "route_strength": [0.5, 1.0, 0.25, 0.75, 0.0],
}
SHORT = {
    "input_ids": [21, 22],
    "route_ids": [2, 0],
    "labels": [21, 22],
    "route_strength": [0.125, 0.375],
}
INTEGER_KEYS = ("input_ids", "attention_mask", "labels", "route_ids")


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


def lists(batch):
    return {key: value.tolist() if torch.is_tensor(value) else value for key, value in batch.items()}


def without(example, *keys):
    return {key: value for key, value in example.items() if key not in keys}
