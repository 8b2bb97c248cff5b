"""Mechanics that methods share: adapters, block finders, optimizers, schedules, signals. Parts never import methods."""
