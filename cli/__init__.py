"""The command line: parse, call, show. No mathematics lives here."""
