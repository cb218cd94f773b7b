"""From a conversation to text and tokens, with proof of which of them are whose: under `data/prompt.py`."""
