"""From rows to batches: encoding a row, data sets of encoded rows, checks of all rows, collation."""
