"""The adapter methods: what is trained on the frozen base."""
