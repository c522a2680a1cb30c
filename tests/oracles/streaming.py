"""Attention sinks and a sliding window, pair by pair."""

import numpy as np


def pairs(q_len, kv_len, *, num_sink, window, causal=True):
    seen = np.zeros((q_len, kv_len), bool)
    for i in range(q_len):
        position = i + kv_len - q_len
        for j in range(kv_len):
            near = 0 <= position - j < window
            seen[i, j] = (j < num_sink or near) and (not causal or j <= position)
    return seen
