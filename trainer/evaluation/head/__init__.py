"""The safety head: predictions on labelled rows, measures with intervals, calibration, plots."""
