"""Studies of what a person waits for: measured on real installations, from outside. Each module holds one STUDY."""
