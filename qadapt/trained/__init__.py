"""An adapter that has been trained, by whatever name, and what is done with it."""
