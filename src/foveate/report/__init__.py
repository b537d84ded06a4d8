"""What a `foveate.measure.compare.Comparison` looks like: a terminal table, a plot, overlays, one HTML file."""
