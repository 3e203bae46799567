"""The method itself, on one machine: no module in this package imports Ray."""
