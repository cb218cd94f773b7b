"""The frozen base: found, loaded in 4 bits, asked for text."""
