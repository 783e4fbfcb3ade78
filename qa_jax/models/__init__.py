"""The encoder, and the encoder with a span head."""
