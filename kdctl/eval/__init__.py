"""How far a model is from the teacher: distributions and tasks."""
