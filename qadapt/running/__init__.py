"""What a run is composed of: base and rows, plan, model in memory, records, and how it goes on."""
