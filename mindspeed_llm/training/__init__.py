"""The loop: batches across ranks, optimizer and schedule, resume, log line, evaluation."""
