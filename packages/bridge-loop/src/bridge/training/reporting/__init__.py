"""Reports of a run: records for loggers, lines for the terminal, throughput."""
