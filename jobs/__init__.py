"""Jobs: the life of a run between the press of a button and the artifact taken home."""
