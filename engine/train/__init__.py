"""The *train* operation: loop, the nine part protocols, trainables, checkpoint, clock, export."""
