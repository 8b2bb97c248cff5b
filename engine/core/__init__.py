"""The words of the engine: recipe, method, slot, parameter, fact, event, artifact, control, error. Nothing here imports torch."""
