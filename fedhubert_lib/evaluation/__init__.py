"""What a representation is worth: keywords, units, cheap probes and cost, each beside its baselines."""
