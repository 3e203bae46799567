"""The lifts and corridors: the core's stages, spread over a Ray cluster. No mathematics here."""
