"""A network as data: the `Graph` value, its closed list of operations and the one interpreter."""

from .graph import BATCH, Graph, Node, Spec
from .module import GraphModule
from .ops import ACTS, OPS

__all__ = ["ACTS", "BATCH", "OPS", "Graph", "GraphModule", "Node", "Spec"]
