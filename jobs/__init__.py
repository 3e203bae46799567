"""One module per stage: parse, make a config, one call, print the artifact's path."""
