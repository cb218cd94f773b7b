"""What answers people: chat."""
