"""A real small language model in numpy whose attention runs in the service."""
