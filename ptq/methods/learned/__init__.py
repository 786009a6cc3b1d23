"""Methods that learn over windows of blocks, one a file: settings of `ptq.learning`."""
