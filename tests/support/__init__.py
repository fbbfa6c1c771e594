"""Helpers of the tests: models, labs, runs, clients."""
