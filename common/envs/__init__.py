"""Environments: made by name, D4RL's physics, AntMaze."""
