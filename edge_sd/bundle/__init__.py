"""A model on disk: our layout, diffusers' folders, optimum-intel's exports, Apple's resources, the hub."""
