"""Reading what `--profile` wrote: where the time of a rank went, and which communication was hidden."""
