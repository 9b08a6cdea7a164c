"""What autograd keeps for a backward pass, found without hooks, which would change what is kept."""

from torch import Tensor


def kept_for(result):
    """The tensors that the graph behind `result` holds."""
    kept, nodes, seen = [], [result.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names = [name for name in dir(node) if name.startswith("_saved_")]
        values = [getattr(node, name) for name in names] + [*getattr(node, "saved_tensors", ())]
        kept += [value for value in values if isinstance(value, Tensor)]
        nodes += [following for following, _ in node.next_functions]
    return kept
