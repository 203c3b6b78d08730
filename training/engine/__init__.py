"""What all trainings share: the trainer, its checkpoints, the folder of a run, results and trackers."""
