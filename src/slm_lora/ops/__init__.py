"""Operators of the training step: attention, cross-entropy, linear layers, dropout, kernels."""
