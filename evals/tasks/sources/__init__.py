"""Where the rows of tasks come from: hub data sets, local files, tasks of the user's own."""
