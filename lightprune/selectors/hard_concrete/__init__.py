"""Hard-concrete masks over all structures (Sheared LLaMA, DRPruning)."""
