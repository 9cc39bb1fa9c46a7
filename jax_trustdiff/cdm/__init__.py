"""Compartmentalized diffusion models: mixtures of models that were each trained on data of their own."""
