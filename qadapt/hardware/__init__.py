"""What cards exist and what this machine has."""
