"""What a person sees: dashboard, tables, journal. Folded from events alone."""
