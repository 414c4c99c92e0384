"""Linear attention with a gate for each key channel (GLA): see README.md."""
