"""Deploying: fold, verify, evaluate both forms on real data, save, report."""
