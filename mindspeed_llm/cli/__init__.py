"""The doors: parse, plan, and wire the rooms together."""
