"""A trained adapter made into something to use: which base, which form, proven, described, pushed."""
