"""Continual learning with supermasks: phases of a task, the learner, KKT, masks and state of all tasks, serving."""
