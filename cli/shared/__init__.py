"""What commands share: tables, models by name, flags of recipes and methods."""
