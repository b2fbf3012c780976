"""What a run reports: records for loggers, lines for the terminal, throughput."""
