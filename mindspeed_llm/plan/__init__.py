"""From options, config.json and checkpoint record to one resolved, checked plan; also what `--dry-run` shows."""
