"""What watches over the numbers of a run: losses, gradients, replicas, repeated batches; and what is done then."""
