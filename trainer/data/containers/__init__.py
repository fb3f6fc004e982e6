"""Where records come from: data files, alone or in folders and zips, and data sets on the Hub."""
