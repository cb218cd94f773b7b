"""What only the user's own machine can show: `qadapt doctor --selftest`."""
