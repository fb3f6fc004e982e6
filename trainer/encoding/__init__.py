"""From rows to batches: encoding rows and data sets, checking all rows before training, collation."""
