"""The virtual imaging trial: digital patients, a CT scanner, its reconstructions, and trials made of them."""
