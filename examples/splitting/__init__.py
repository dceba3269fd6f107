"""The split autoencoder's parts: model and training, measures."""
