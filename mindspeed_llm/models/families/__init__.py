"""One file per model family: which configs it reads, which tensors it has. Found by being here; no list to extend."""
