"""What reuse does to answers: question sets, metrics, and the table behind `pcache eval`."""
