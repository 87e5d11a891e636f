"""Training and compressing GANs. The networks are in `sparsekit.models`."""
