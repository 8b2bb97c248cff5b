"""The plots that stories can follow, one function each; the first line of its docstring is what happens."""

from engine.starters.plots import craft, nature, objects, people

PLOTS = (*objects.PLOTS, *nature.PLOTS, *people.PLOTS, *craft.PLOTS)

__all__ = ["PLOTS"]
