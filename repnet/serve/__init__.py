"""`repnet serve`: a deploy model behind HTTP, in any of its formats."""
