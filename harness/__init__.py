"""What any training run needs: settings, tasks, models, batches, predictions, and what a run has on disk."""
