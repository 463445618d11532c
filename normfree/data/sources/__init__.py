"""Sources: data sets that a user names or stores, each opened as a `Source` or a `Split`."""
