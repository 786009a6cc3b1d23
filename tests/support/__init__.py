"""What tests share: tiny models, made-up records, the table of bytes."""
