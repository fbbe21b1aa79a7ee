"""What everything else uses: errors in one line, lines in the log, commands, files that are never
half-written."""
