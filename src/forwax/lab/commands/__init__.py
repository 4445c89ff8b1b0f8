"""The subcommands: their options, and what they print and write."""
