"""What a backend implements, and what its implementations share."""
