"""The commands: one file per group, the only place that catches every qadapt error."""
