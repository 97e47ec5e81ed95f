"""Networks, optimizers, any settings and classical baselines, compared over seeds: which differences hold."""
