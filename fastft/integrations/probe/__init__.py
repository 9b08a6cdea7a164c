"""Does a model keep packed sequences apart? It is asked before it is trained on such."""
