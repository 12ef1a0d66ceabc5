"""Reading and writing weights: release folders and published checkpoints."""
