"""Pure arithmetic, no torch: what a step takes, and the fastest setting that fits."""
